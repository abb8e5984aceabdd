"""COCO result rows."""

from __future__ import annotations

import json

import numpy as np

from mmfinetune.evaluation.rows import result_rows
from mmfinetune.utils.masks import mask_to_rle

IDS = [7, 3]
BOXES = np.array([[1.25, 2, 4.5, 8], [0.1, 0.2, 0.3, 0.7]], np.float32)


def test_numbers_are_as_short_as_they_are_exact():
    values = np.random.default_rng(0).uniform(0, 500, 1000).astype(np.float32)
    rows = result_rows(1, IDS, np.zeros(1000, int), values)
    scores = [row['score'] for row in rows]
    assert (np.array(scores, np.float32) == values).all()
    assert max(len(repr(s)) for s in scores) <= 10


def test_boxes_are_left_top_width_height():
    rows = result_rows(9, IDS, np.array([1, 0]), np.float32([0.5, 0.25]), boxes=BOXES)
    assert rows[0] == {'image_id': 9, 'category_id': 3, 'score': 0.5, 'bbox': [1.25, 2.0, 3.25, 6.0]}
    assert rows[1]['category_id'] == 7
    assert json.loads(json.dumps(rows)) == rows


def test_masks_may_be_pixels_or_run_lengths():
    masks = np.zeros((2, 5, 6), bool)
    masks[0, 1:3, 2:4] = True
    expected = [mask_to_rle(m) for m in masks]
    encoded = [{'size': tuple(r['size']), 'counts': r['counts'].encode()} for r in expected]
    for given in (masks, expected, encoded):
        rows = result_rows(1, IDS, np.zeros(2, int), np.float32([0.5, 0.25]), masks=given)
        assert [row['segmentation'] for row in rows] == expected
        assert set(rows[0]) == {'image_id', 'category_id', 'score', 'segmentation'}


def test_nothing_found():
    empty = np.zeros(0)
    assert result_rows(1, IDS, empty, empty, np.zeros((0, 4)), np.zeros((0, 3, 3))) == []
