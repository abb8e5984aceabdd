"""What must hold for any input, tried by hypothesis. ``HYPOTHESIS_PROFILE=long`` tries more."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.check.repair import fix
from mmfinetune.data.check.run import Options, check
from mmfinetune.data.split import split_file
from mmfinetune.utils.errors import Problem, UserError
from mmfinetune.utils.masks import check_rle, mask_to_rle, masks_to_rles, run_lengths

settings.register_profile(
    'short',
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile('long', settings.get_profile('short'), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'short'))

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))
SIDE = 32


# Run-length codes


@given(MASKS)
def test_a_mask_comes_back_from_its_rle(mask):
    rle = mask_to_rle(mask)
    assert check_rle(rle, *mask.shape) == rle
    assert (mask_api.decode(rle) == mask).all()
    total, of_object = run_lengths([rle['counts'].encode()])
    assert (total[0], of_object[0]) == (mask.size, mask.sum())


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3)))
def test_all_values_at_once_are_the_masks_one_by_one(indices):
    assert masks_to_rles(indices, range(4)) == [mask_to_rle(indices == value) for value in range(4)]


@given(
    st.one_of(
        st.text(st.characters(min_codepoint=32, max_codepoint=127), max_size=30),
        st.lists(st.one_of(st.integers(-3, 1 << 34), st.floats(), st.booleans()), max_size=6),
        st.none(),
    ),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_any_counts_are_a_valid_mask_or_a_problem(counts, height, width):
    try:
        rle = check_rle({'size': [height, width], 'counts': counts}, height, width)
    except Problem:
        return
    assert mask_api.decode(rle).shape == (height, width)


@given(MASKS, st.lists(st.binary(min_size=1, max_size=12), max_size=4))
def test_a_damaged_code_does_not_spoil_its_neighbours(mask, others):
    good = mask_to_rle(mask)['counts'].encode()
    totals, objects = run_lengths([*others, good])
    assert (totals[-1], objects[-1]) == (mask.size, mask.sum())


# Data sets


def data_set(images: int = 4) -> dict:
    """Two classes; polygons, a mask and a crowd region in each image."""
    square = [4.0, 4.0, 20.0, 4.0, 20.0, 20.0, 4.0, 20.0]
    mask = np.zeros((SIDE, SIDE), bool)
    mask[22:30, 8:28] = True
    entries = []
    for image in range(1, images + 1):
        shapes = (([square], [4, 4, 16, 16], 256.0, 0), (mask_to_rle(mask), [8, 22, 20, 8], 160.0, image % 2))
        for segmentation, box, area, crowd in shapes:
            entries.append(
                dict(
                    id=len(entries) + 1,
                    image_id=image,
                    category_id=1 + (image + crowd) % 2,
                    segmentation=segmentation,
                    bbox=box,
                    area=area,
                    iscrowd=crowd,
                    attributes=dict(occluded=0.5),
                )
            )
    return dict(
        info=dict(version=1.0),
        images=[dict(id=i, file_name=f'part{i % 2}_{i}.png', width=SIDE, height=SIDE) for i in range(1, images + 1)],
        annotations=entries,
        categories=[dict(id=1, name='bolt'), dict(id=2, name='nut')],
    )


@pytest.fixture(scope='module')
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('images')
    draw = np.random.default_rng(0)
    for image in data_set(4)['images']:
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(root / image['file_name'])
    return root


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 1 << 70),
        st.floats(),
        st.sampled_from(['', 'bolt', '../x.png', 'part1_1.png', '\ud800', 'a' * 300]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(['id', 'name', 'size', 'counts', 'image_id']), inner, max_size=3),
    ),
    max_leaves=6,
)


@st.composite
def spoiled(draw) -> dict:
    """A data set in which one to three nodes are removed or replaced by any JSON value."""
    data = copy.deepcopy(data_set())
    for _ in range(draw(st.integers(1, 3))):
        node, key = {'top': data}, 'top'
        while True:
            inner = node[key]
            keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else []
            if not keys or (node is not data and draw(st.integers(0, 3)) == 0 and key != 'top'):
                break
            node, key = inner, draw(st.sampled_from(list(keys)))
        if key == 'top':
            continue
        if draw(st.booleans()):
            node[key] = draw(JSON)
        else:
            del node[key]
    return data


QUICK = Options(workers=1, cache=False, progress=False)


@given(spoiled())
def test_any_annotation_file_is_checked_and_a_repair_holds(tmp_path_factory, image_root, data):
    folder = tmp_path_factory.mktemp('spoiled')
    path = folder / 'instances_train.json'
    path.write_text(json.dumps(data))
    splits = {'train': (path, image_root)}
    check(splits, options=QUICK)  # never raises
    try:
        fixed = fix(splits, folder / 'fixed', options=QUICK)
    except UserError:
        assert not (folder / 'fixed').exists()
        return
    copy_of = {split: (file, folder / 'fixed/images') for split, file in fixed.paths.items()}
    assert [finding.line() for finding in check(copy_of, options=QUICK).of('error')] == []
    # What is repaired stays as it is.
    assert fix(copy_of, folder / 'again', options=QUICK).changes == []


@given(
    st.integers(6, 40),
    st.permutations(range(3)),
    st.sampled_from([None, r'^(part\d)', r'_(\d)']),
    st.sampled_from([(70, 15, 15), (80, 20), (50, 50, 0)]),
    st.integers(0, 5),
)
def test_a_split_is_a_partition_that_keeps_series_whole(tmp_path_factory, images, order, group_by, ratios, seed):
    folder = tmp_path_factory.mktemp('split')
    data = data_set(images)
    shuffled = dict(data, images=data['images'][order[0] :] + data['images'][: order[0]])
    found = []
    for name, content in (('a', data), ('b', shuffled)):
        source = folder / name / 'all.json'
        source.parent.mkdir()
        source.write_text(json.dumps(content))
        try:
            report = split_file(source, ratios, seed, group_by, out=folder / f'{name}_out')
        except UserError as error:
            found.append(error.code)
            continue
        parts = {s: json.loads(file.read_text()) for s, file in report.files.items()}
        names = {s: {i['file_name'] for i in part['images']} for s, part in parts.items()}
        assert sorted(n for part in names.values() for n in part) == sorted(i['file_name'] for i in data['images'])
        assert sum(len(part['annotations']) for part in parts.values()) == len(data['annotations'])
        for part in parts.values():
            assert {a['image_id'] for a in part['annotations']} <= {i['id'] for i in part['images']}
            assert part['categories'] == data['categories'] and part['images']
        if group_by == r'^(part\d)':
            assert all(len({s for s in names if any(n.startswith(g) for n in names[s])}) == 1 for g in ('part0', 'part1'))
        found.append(names)
    assert found[0] == found[1]  # the order within the file decides nothing
