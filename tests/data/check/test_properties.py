"""Whatever is changed in a COCO file, the check tells it without a crash, and a repair is one."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfinetune.data import coco_json, split
from mmfinetune.data.check import repair
from mmfinetune.data.check.report import as_html, as_text
from mmfinetune.data.check.run import Options, check
from mmfinetune.utils.errors import UserError
from tests.builders.coco import CocoData

PLAIN = Options(cache=False, workers=1, progress=False)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.just('\ud800'),
    st.lists(st.one_of(st.integers(-9, 99), st.floats(), st.lists(st.integers(-9, 99), max_size=8)), max_size=8),
    st.just({}),
    st.fixed_dictionaries({'size': st.just([30, 40]), 'counts': st.text('0123456789`abc', max_size=9)}),
    st.fixed_dictionaries({'size': st.just([30, 40]), 'counts': st.lists(st.integers(-1, 2**33), max_size=4)}),
)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def places(node: Any) -> list[tuple[Any, Any]]:
    """All containers and keys in a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places(node[key])]]


@contextlib.contextmanager
def mutated(draw: Any):
    """A small data set of which one place is taken away or has another value."""
    with tempfile.TemporaryDirectory() as folder:
        data = CocoData(Path(folder))
        data.write()
        content = json.loads(data.path.read_text())
        # What no check reads, and a copy must keep.
        content['info'] = {'version': 1.0}
        content['annotations'][0]['attributes'] = {'occluded': 0.5}
        node, key = draw(st.sampled_from(places(content)))
        if draw(st.booleans()):
            node[key] = draw(VALUES)
        else:
            del node[key]
        data.path.write_text(json.dumps(content))
        yield {'train': (data.path, data.root)}


@given(st.data())
@MANY
def test_the_check_never_crashes(data):
    with mutated(data.draw) as splits:
        report = check(splits, None, PLAIN)
        assert as_text(report) and as_html(report)
        json.dumps(report.as_dict(), allow_nan=False)
        with contextlib.suppress(UserError):
            coco_json.read(splits['train'][0]).require(('width', 'height'), ('id', 'bbox', 'area'))


@given(st.data())
@MANY
def test_a_repaired_copy_has_no_errors_and_needs_no_repair(data):
    with mutated(data.draw) as splits:
        out = splits['train'][0].parent / 'out'
        try:
            fixed = repair.fix(splits, out, None, PLAIN)
        except UserError:
            assert not out.exists()
            return
        assert fixed.report.good
        again = repair.fix({'train': (fixed.paths['train'], out / 'images')}, out.with_name('again'), None, PLAIN)
        assert again.changes == []


@given(st.data())
@MANY
def test_a_split_is_a_partition_with_whole_groups(data):
    groups = data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=30).filter(lambda found: len(set(found)) > 1))
    names = [f'{group}_{i}.jpg' for i, group in enumerate(groups)]
    labels = [data.draw(st.lists(st.integers(1, 3), max_size=3)) for _ in names]
    images = [{'id': i, 'file_name': name} for i, name in enumerate(names)]
    annotations = [{'image_id': i, 'category_id': c} for i, found in enumerate(labels) for c in found]
    content = {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': c, 'name': f'c{c}'} for c in (1, 2, 3)],
    }
    shuffled = copy.deepcopy(content)
    np.random.default_rng(0).shuffle(shuffled['images'])
    results = []
    for whole in (content, shuffled):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'instances_all.json'
            path.write_text(json.dumps(whole))
            report = split.split_file(path, (60, 40), group_by=r'^(\d+)_')
            files = [json.loads(p.read_text())['images'] for p in report.files.values()]
            results.append([sorted(i['file_name'] for i in file) for file in files])
    assert results[0] == results[1]
    assert sorted(results[0][0] + results[0][1]) == sorted(names)
    train, val = ({name.split('_')[0] for name in part} for part in results[0])
    assert train and val and not train & val
