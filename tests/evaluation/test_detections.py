from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.evaluation import detections
from mmfinetune.evaluation.detections import Truth, checked_rows, image_folder, read_rows, read_truth, result_rows
from mmfinetune.utils.masks import mask_to_rle
from tests.builders.errors import codes, refused
from tests.builders.results import CAT, DOG, data_set, rows_of, write

A, B = (5, 5, 25, 25), (40, 10, 70, 50)
THINGS = [(1, CAT, A), (2, DOG, B, True)]
ROWS = rows_of([(1, CAT, A, 0.9), (2, DOG, B, 0.5)])


@pytest.fixture
def truth() -> Truth:
    return Truth(Path('made.json'), data_set(THINGS))


def spoilt(part: str, **changes) -> dict:
    """A data set whose first item of a part is changed; None takes a key away."""
    data = data_set(THINGS)
    for key, value in changes.items():
        data[part][0][key] = value
        if value is None:
            del data[part][0][key]
    return data


def test_truth(tmp_path):
    data = data_set(THINGS)
    del data['annotations'][0]['iscrowd']
    found = read_truth(write(tmp_path / 'a.json', data))
    assert list(found.images) == [1, 2]
    assert found.names == {7: 'cat', 2: 'dog', 4: 'cow'}
    assert list(found.names) == [7, 2, 4]  # the order of the file
    assert found.counts == {7: 1, 2: 0, 4: 0}
    assert found.crowds == 1
    assert [a['iscrowd'] for a in found.data['annotations']] == [0, 1]


@pytest.mark.parametrize('shape', ['polygons', 'counts', 'rle'])
def test_masks_of_the_truth(truth, shape):
    rle = truth.data['annotations'][0]['segmentation']
    mask = mask_api.decode(rle)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.ravel('F'), [2]])))).tolist()
    value = {
        'rle': rle,
        'polygons': [[5, 5, 25, 5, 25, 15, 5, 15], [5, 15, 25, 15, 25, 25, 5, 25]],
        'counts': {'size': rle['size'], 'counts': runs},
    }[shape]
    found = truth.rle({'image_id': 1, 'segmentation': value})
    assert mask_api.decode(found).tolist() == mask.tolist()


@pytest.mark.parametrize('content', ['{"images"', '[]', '{"images": [], "annotations": {}}'])
def test_broken_annotation_files(tmp_path, content):
    path = tmp_path / 'a.json'
    path.write_text(content)
    with refused('coco-file', path=path):
        read_truth(path)


def test_missing_annotation_file(tmp_path):
    with refused('coco-missing', path=tmp_path / 'a.json'):
        read_truth(tmp_path / 'a.json')
    with refused('coco-file', path=tmp_path) as caught:
        read_truth(tmp_path)
    assert codes(caught.value.problems) == ['coco-file-unreadable']


@pytest.mark.parametrize(
    'data, code, problem, places',
    [
        (spoilt('images', width=None), 'coco-entries', 'coco-keys-missing', 'number 1'),
        (spoilt('annotations', area=None), 'coco-entries', 'coco-keys-missing', 'number 1'),
        (spoilt('annotations', id=0), 'coco-entries', 'coco-id-zero', '1'),
        (spoilt('annotations', id=2), 'coco-entries', 'coco-repeated', '2'),
        (spoilt('annotations', image_id=99), 'coco-entries', 'coco-link', '99'),
        (spoilt('annotations', segmentation=None), 'truth-masks', 'truth-no-mask', 'id 1'),
        (spoilt('annotations', segmentation=[]), 'truth-masks', 'truth-no-mask', 'id 1'),
        (
            spoilt('annotations', segmentation={'size': [80, 60], 'counts': ''}),
            'truth-masks',
            'truth-mask-size',
            'id 1',
        ),
        (spoilt('categories', name='dog'), 'coco-entries', 'coco-repeated', "'dog'"),
    ],
)
def test_annotations_that_cannot_be_evaluated(tmp_path, data, code, problem, places):
    path = write(tmp_path / 'a.json', data)
    with refused(code, path=path) as caught:
        read_truth(path)
    assert [(p.code, p.facts['places']) for p in caught.value.problems] == [(problem, places)]


def test_boxes_need_no_masks(tmp_path):
    path = write(tmp_path / 'a.json', spoilt('annotations', segmentation=None))
    assert read_truth(path, masks=False).counts[CAT] == 1


def test_rows(tmp_path, truth):
    both = [
        {**row, 'bbox': [0, 0, 1, 1], 'id': 3, 'more': None, 'file_name': f'/elsewhere/image_{row["image_id"]}.png'}
        for row in ROWS
    ]
    found = read_rows(write(tmp_path / 'p.json', both))
    assert checked_rows(tmp_path, found, truth, 'segm') == ROWS
    assert [r['bbox'] for r in checked_rows(tmp_path, found, truth, 'bbox')] == [[0, 0, 1, 1]] * 2
    assert detections.holds(found, 'bbox')
    assert not detections.holds(ROWS, 'bbox')


def test_run_lengths_as_numbers(truth):
    mask = mask_api.decode(ROWS[0]['segmentation'])
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.ravel('F'), [2]])))).tolist()
    row = {**ROWS[0], 'segmentation': {'size': [60, 80], 'counts': runs}}
    assert checked_rows(Path('p.json'), [row], truth, 'segm') == ROWS[:1]


@pytest.mark.parametrize(
    'content, code', [('', 'rows-unreadable'), ('[]', 'rows-empty'), ('{}', 'rows-no-list'), (None, 'rows-unreadable')]
)
def test_files_without_rows(tmp_path, content, code):
    path = tmp_path / 'p.json'
    if content is not None:
        path.write_text(content)
    with refused(code, path=path):
        read_rows(path)


def test_a_data_set_is_not_a_file_of_rows(tmp_path):
    with refused('rows-no-list') as caught:
        read_rows(write(tmp_path / 'p.json', {'annotations': []}))
    assert 'not a data set' in caught.value.hint


def changed(**changes) -> list[dict]:
    rows = copy.deepcopy(ROWS)
    for key, value in changes.items():
        rows[1][key] = value
        if value is None:
            del rows[1][key]
    return rows


@pytest.mark.parametrize(
    'rows, key, unknown, count',
    [
        (changed(image_id=99), 'image_id', {99: 1}, 2),
        ([{**r, 'image_id': 90 + r['image_id']} for r in ROWS], 'image_id', {91: 1, 92: 1}, 2),
        (changed(category_id=1), 'category_id', {1: 1}, 2),
    ],
)
def test_ids_of_other_data(truth, rows, key, unknown, count):
    with refused('rows-ids', path=Path('p.json'), truth=truth.path, key=key, count=count) as caught:
        checked_rows(Path('p.json'), rows, truth, 'segm')
    assert {p.facts['id']: p.facts['count'] for p in caught.value.problems} == unknown
    assert key == 'image_id' or '7 cat, 2 dog' in caught.value.hint


@pytest.mark.parametrize(
    'rows, code, places',
    [
        (changed(score=None), 'row-keys', 'row 2'),
        (changed(score=float('nan')), 'row-score', 'row 2'),
        (changed(score='0.5'), 'row-score', 'row 2'),
        (changed(image_id=None), 'row-keys', 'row 2'),
        (changed(image_id=[1]), 'row-id-type', 'row 2'),
        (changed(segmentation=[[1, 2, 3, 4, 5, 6]]), 'row-shape', 'row 2'),
        (changed(segmentation={'size': [60], 'counts': 'a'}), 'row-shape', 'row 2'),
        (
            changed(segmentation={'size': [80, 60], 'counts': ROWS[1]['segmentation']['counts']}),
            'row-mask-size',
            'row 2 [80, 60] in image 2 of [60, 80]',
        ),
        (changed(segmentation={'size': [60, 80], 'counts': 'hello world'}), 'row-mask', 'row 2'),
        (changed(segmentation={'size': [60, 80], 'counts': [9000, 9000]}), 'row-mask', 'row 2'),
        (
            changed(file_name='train/image_7.png'),
            'row-other-image',
            'row 2 of train/image_7.png, image 2 is image_2.png',
        ),
        ([*ROWS, 5], 'row-type', 'row 3'),
    ],
)
def test_rows_that_cannot_be_evaluated(truth, rows, code, places):
    with refused('rows-broken', path=Path('p.json'), truth=truth.path) as caught:
        checked_rows(Path('p.json'), rows, truth, 'segm')
    (problem,) = caught.value.problems
    assert (problem.code, problem.facts['count']) == (code, 1)
    assert problem.facts['places'].startswith(places)


@pytest.mark.parametrize(
    'box',
    [[1, 2, 3], [1, 2, -3, 4], [1, 2, 3, None], 'box', [1, 2, 3, float('inf')], [True, 2, 3, 4], [1, 2, 3, 10**400]],
)
def test_boxes_that_cannot_be_evaluated(truth, box):
    rows = [*rows_of([(1, CAT, A, 0.9)], 'bbox'), {**ROWS[0], 'bbox': box}]
    with refused('rows-broken') as caught:
        checked_rows(Path('p.json'), rows, truth, 'bbox')
    assert [(p.code, p.facts['places']) for p in caught.value.problems] == [('row-box', 'row 2')]


def test_the_other_kind_of_file(truth):
    with refused('rows-boxes', path=Path('p.json')):
        checked_rows(Path('p.json'), rows_of([(1, CAT, A, 0.9)], 'bbox'), truth, 'segm')
    with refused('rows-other-kind', key='bbox'):
        checked_rows(Path('p.json'), ROWS, truth, 'bbox')


def test_folder_of_the_images(tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'pictures').mkdir()
    truth = read_truth(write(tmp_path / 'annotations' / 'a.json', data_set(THINGS)))
    assert image_folder(truth, None) is None
    Image.new('RGB', (80, 60)).save(tmp_path / 'pictures' / 'image_1.png')
    with refused('truth-images', root=tmp_path / 'pictures', missing=1, count=2) as caught:
        image_folder(truth, tmp_path / 'pictures')
    assert caught.value.problems == [tmp_path / 'pictures/image_2.png']
    Image.new('RGB', (80, 60)).save(tmp_path / 'pictures' / 'image_2.png')
    assert image_folder(truth, tmp_path / 'pictures') == tmp_path / 'pictures'
    assert image_folder(truth, None) is None
    for image in (tmp_path / 'pictures').iterdir():
        image.rename(tmp_path / image.name)
    assert image_folder(truth, None) == tmp_path
    assert json.loads(truth.path.read_text())  # it was only read


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
