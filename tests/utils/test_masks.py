"""Masks, polygons and run-length codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as mask_api

from mmfinetune.utils.errors import Problem
from mmfinetune.utils.masks import check_polygon, check_rle, mask_to_rle, masks_to_rles, run_lengths, to_rle
from tests.builders.errors import faulty


def test_masks_of_an_index_image_are_those_pixels():
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(rng.integers(1, 30, 2))
        image = rng.integers(0, rng.integers(1, 6) + 1, shape).astype(rng.choice(['uint8', 'uint16', 'int32']))
        values = [0, 1, 2, 5, 9]
        rles = masks_to_rles(image, values)
        assert rles == [mask_to_rle(image == value) for value in values]
        for value, rle in zip(values, rles, strict=True):
            assert (mask_api.decode(rle) == (image == value)).all()
            json.dumps(rle)


def test_runs_of_a_compressed_rle_are_those_of_pycocotools():
    rng = np.random.default_rng(1)
    for density in (0, 0.001, 0.3, 0.9, 1):
        mask = (rng.random((300, 211)) < density).astype(np.uint8)
        totals, areas = run_lengths([mask_to_rle(mask)['counts'].encode()])
        assert (totals.tolist(), areas.tolist()) == ([mask.size], [mask.sum()])


W, H = 40, 20
GOOD = mask_to_rle(np.eye(H, W, dtype=np.uint8))


@pytest.mark.parametrize('counts', [[0, H * W], [H * W], [3, 5, H * W - 8]])
def test_counts_of_a_valid_rle_are_compressed(counts):
    rle = check_rle({'size': [H, W], 'counts': counts}, H, W)
    assert isinstance(rle['counts'], str)
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    assert (mask_api.decode(rle).ravel(order='F') == flat).all()
    assert check_rle(rle, H, W) == rle == to_rle(rle, H, W)
    assert check_rle(GOOD, H, W) == GOOD


@pytest.mark.parametrize(
    'rle, code',
    [
        ({'size': [W, H], 'counts': GOOD['counts']}, 'size'),
        ({'size': [H, W]}, 'keys'),
        ([1, 2], 'keys'),
        ({'size': [H, W], 'counts': [1, 2]}, 'pixels'),
        ({'size': [H, W], 'counts': []}, 'empty'),
        ({'size': [H, W], 'counts': ''}, 'empty'),
        ({'size': [H, W], 'counts': [H * W + 5, -5]}, 'run'),
        ({'size': [H, W], 'counts': [10**30]}, 'run'),
        ({'size': [H, W], 'counts': [1.0, 799.0]}, 'type'),
        ({'size': [H, W], 'counts': [True, 799]}, 'type'),
        ({'size': [H, W], 'counts': None}, 'type'),
        ({'size': [H, W], 'counts': GOOD['counts'][:-1]}, 'damaged'),
        ({'size': [H, W], 'counts': 'garbage!'}, 'damaged'),
        ({'size': [H, W], 'counts': 'ünï'}, 'ascii'),
        ({'size': [H, W], 'counts': 'o' * 500}, 'damaged'),
    ],
)
def test_rle_problems(rle, code):
    with faulty(f'shape-rle-{code}'):
        check_rle(rle, H, W)


@pytest.mark.parametrize('side', [1 << 16, 1 << 20])
def test_a_run_of_more_than_32_bits_is_a_problem_and_no_overflow(side):
    with faulty('shape-rle-run'):
        check_rle({'size': [side, side], 'counts': [side * side]}, side, side)
    # The same number as the string that pycocotools would write if it could.
    text, value = b'', side * side
    while value:
        text, value = text + bytes([48 + (value & 31) + 32 * (value >= 16)]), value >> 5
    with faulty('shape-rle-damaged'):
        check_rle({'size': [side, side], 'counts': text.decode()}, side, side)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(min_codepoint=40, max_codepoint=120), min_size=1, max_size=12), min_size=1))
def test_damaged_strings_one_by_one_are_those_together(strings):
    together = run_lengths([text.encode() for text in strings])
    for k, text in enumerate(strings):
        totals, areas = run_lengths([text.encode()])
        assert totals[0] == together[0][k]
        assert totals[0] < 0 or areas[0] == together[1][k]


@pytest.mark.parametrize('points', [[0, 0, 5, 0, 5, 5], [-3.5, -1, 41, 0, 20, 19.99], [1, 1], []])
def test_polygons_that_are_fine(points):
    check_polygon(points, H, W)


@pytest.mark.parametrize(
    'points, code',
    [
        ([0, 0, 5, 0, 5], 'odd'),
        ([0, 0, 5, 0, float('nan'), 5], 'nan'),
        ([0, 0, 5, 0, float('inf'), 5], 'nan'),
        ([0, 0, 5, 0, 10**400, 5], 'far'),
        ([0, 0, 5, 0, 1e6, 5], 'far'),
        ([0, 0, 5, 0, -41, 5], 'far'),
        ([0, 0, '5', 0, 5, 5], 'number'),
        ([0, 0, True, 0, 5, 5], 'number'),
        ([0, 0, None, 0, 5, 5], 'number'),
        ('0 0 5 0 5 5', 'type'),
        (None, 'type'),
    ],
)
def test_polygon_problems(points, code):
    with faulty(f'shape-polygon-{code}'):
        check_polygon(points, H, W)


MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


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
