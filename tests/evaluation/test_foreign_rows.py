"""Predictions of other tools: read as they are meant, said, or refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_api

from mmfinetune.evaluation.detections import Truth, checked_rows
from mmfinetune.evaluation.foreign_rows import regular
from tests.builders.errors import codes, message, refused
from tests.builders.results import CAT, DOG, data_set, rle_of, rows_of, xywh

BOXES = [(1, CAT, (5, 5, 25, 25)), (2, DOG, (40, 10, 70, 50)), (2, CAT, (10, 30, 30, 55))]
PATH = Path('p.json')
ROWS = [{**row, 'bbox': xywh(box)} for row, (_, _, box) in zip(rows_of([(*b, 0.9) for b in BOXES]), BOXES, strict=True)]


@pytest.fixture
def truth() -> Truth:
    return Truth(Path('made.json'), data_set(BOXES))


def named(truth: Truth, *names: str) -> Truth:
    for image, name in zip(truth.data['images'], names, strict=True):
        image['file_name'] = name
    return truth


def rows_with(key: str, values: dict) -> list[dict]:
    return [{**row, key: values[row[key]]} for row in copy.deepcopy(ROWS)]


def test_cocos_own_rows_stay(truth):
    assert regular(PATH, ROWS, truth) == (ROWS, [])
    assert regular(PATH, [3, {}, {'image_id': [1]}], truth) == ([3, {}, {'image_id': [1]}], [])


@pytest.mark.parametrize('spell', [str, float, '{}.0'.format, '0{}'.format])
def test_ids_as_text_or_floats(truth, spell):
    rows = rows_with('image_id', {1: spell(1), 2: spell(2)})
    if spell(1) == '1.0':
        with refused('rows-ids'):
            checked_rows(PATH, regular(PATH, rows, truth)[0], truth, 'segm')
        return
    assert regular(PATH, rows, truth) == (ROWS, [])
    rows = rows_with('category_id', {CAT: spell(CAT), DOG: spell(DOG)})
    assert regular(PATH, rows, truth) == (ROWS, [])


@pytest.mark.parametrize(
    'spellings',
    [
        ('val/a', 'val/b'),
        ('a', 'b'),
        ('val/a.png', 'val/b.png'),
        ('a.jpg', 'b.jpg'),
        ('/home/her/set/val/a.png', '/home/her/set/val/b.png'),
        ('C:\\set\\val\\a.png', 'C:\\set\\val\\b.png'),
        ('./val/a.png', './val/b.png'),
    ],
)
def test_names_of_images(truth, spellings):
    named(truth, 'val/a.png', 'val/b.png')
    rows, notes = regular(PATH, rows_with('image_id', dict(enumerate(spellings, 1))), truth)
    assert rows == ROWS
    assert notes == [message('rows-named', key='image_id', count=2, example=notes[0].facts['example'])]


def test_names_with_a_dot_and_numbers_of_names(truth):
    named(truth, 'x/a.v1.png', 'x/a.v2.png')
    assert regular(PATH, rows_with('image_id', {1: 'a.v1', 2: 'a.v2'}), truth)[0] == ROWS
    # Ultralytics makes a number of a name of digits.
    named(truth, '000000000139.jpg', '000000000285.jpg')
    assert regular(PATH, rows_with('image_id', {1: 139, 2: 285}), truth)[0] == ROWS
    assert regular(PATH, rows_with('image_id', {1: '000000000139', 2: '000000000285'}), truth)[0] == ROWS


def test_names_of_several_images_and_of_none_are_refused(truth):
    named(truth, 'cam1/a.png', 'cam2/a.png')
    for values in ({1: 'a', 2: 'a'}, {1: 'cam3/a', 2: 'cam4/a'}, {1: 'b', 2: 'c'}):
        rows, notes = regular(PATH, rows_with('image_id', values), truth)
        assert notes == []
        with refused('rows-ids', key='image_id'):
            checked_rows(PATH, rows, truth, 'segm')
    assert regular(PATH, rows_with('image_id', {1: 'cam1/a', 2: 'cam2/a'}), truth)[0] == ROWS
    # One name of another split is told by itself.
    rows, _ = regular(PATH, rows_with('image_id', {1: 'cam1/a', 2: 'c'}), truth)
    with refused('rows-ids', unknown=1):
        checked_rows(PATH, rows, truth, 'segm')


def test_ids_that_are_names_of_other_images(truth):
    named(truth, '2.png', '1.png')
    rows, notes = regular(PATH, ROWS, truth)
    assert (rows, codes(notes)) == (ROWS, ['rows-also-named'])
    # `checked_rows` compares file names.
    assert regular(PATH, [{**row, 'file_name': f'{3 - row["image_id"]}.png'} for row in ROWS], truth)[1] == []


def test_names_of_classes(truth):
    rows, notes = regular(PATH, rows_with('category_id', {CAT: 'cat', DOG: 'dog'}), truth)
    assert (rows, codes(notes)) == (ROWS, ['rows-named'])
    with refused('rows-ids', key='category_id'):
        checked_rows(PATH, regular(PATH, rows_with('category_id', {CAT: 'catt', DOG: 'dog'}), truth)[0], truth, 'segm')


def corners(box: list) -> list:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def centred(box: list) -> list:
    return [box[0] + box[2] / 2, box[1] + box[3] / 2, *box[2:]]


@pytest.mark.parametrize(
    ('write', 'reading'), [(corners, 'x1, y1, x2, y2'), (centred, 'centre x, centre y, width, height')]
)
def test_a_mask_tells_how_its_box_is_written(truth, write, reading):
    rows, notes = regular(PATH, [{**row, 'bbox': write(row['bbox'])} for row in ROWS], truth)
    assert rows == ROWS
    assert notes == [message('rows-boxes-read', count=3, reading=reading)]


def test_boxes_that_differ_from_their_masks_stay(truth):
    rows = [{**row, 'bbox': [max(0, v - 3) for v in row['bbox']]} for row in ROWS]
    assert regular(PATH, rows, truth) == (rows, [])
    rows = [{**row, 'bbox': [0, 0, 80, 60]} for row in ROWS]
    assert regular(PATH, rows, truth) == (rows, [])
    rows = [{**row, 'segmentation': {'size': [60, 80], 'counts': 'broken'}} for row in ROWS]
    assert regular(PATH, rows, truth) == (rows, [])


def test_boxes_without_masks_that_leave_their_images(truth):
    rows = [{k: v for k, v in row.items() if k != 'segmentation'} for row in ROWS]
    assert regular(PATH, rows, truth) == (rows, [])
    rows = [{**row, 'bbox': corners(row['bbox'])} for row in rows]
    found, notes = regular(PATH, rows, truth)
    assert (found, notes) == (rows, [message('rows-boxes-leave', count=2, all=3)])


@pytest.mark.parametrize('key', ['bbox', 'segmentation'])
def test_relative_coordinates(truth, key):
    values = {'bbox': [0.1, 0.2, 0.3, 0.4], 'segmentation': [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]}
    with refused('rows-relative', path=PATH, key=key):
        regular(PATH, [{**row, key: values[key]} for row in ROWS], truth)


@pytest.mark.parametrize('flat', [False, True])
def test_polygons(truth, flat):
    rows = copy.deepcopy(ROWS)
    for row, (_, _, (x1, y1, x2, y2)) in zip(rows, BOXES, strict=True):
        polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
        row['segmentation'] = polygon if flat else [polygon]
    found, notes = regular(PATH, rows, truth)
    assert notes == [message('rows-polygons', count=3)]
    for row, (_, _, box) in zip(checked_rows(PATH, found, truth, 'segm'), BOXES, strict=True):
        assert np.array_equal(mask_api.decode(row['segmentation']), mask_api.decode(rle_of(box)))
    rows[0]['segmentation'] = [[1, 2, float('nan'), 4, 5, 6]]
    with refused('rows-broken') as caught:
        checked_rows(PATH, regular(PATH, rows, truth)[0], truth, 'segm')
    assert codes(caught.value.problems) == ['row-shape']
