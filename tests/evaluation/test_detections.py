from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.evaluation import detections
from mmfinetune.evaluation.detections import Truth, checked_rows, image_folder, read_rows, read_truth
from mmfinetune.utils.errors import UserError
from tests.builders.results import CAT, DOG, data_set, rows_of, write

A, B = (5, 5, 25, 25), (40, 10, 70, 50)
THINGS = [(1, CAT, A), (2, DOG, B, True)]
ROWS = rows_of([(1, CAT, A, 0.9), (2, DOG, B, 0.5)])


@pytest.fixture
def truth() -> Truth:
    return Truth(Path('made.json'), data_set(THINGS))


def refused(*parts: str):
    """Expects a UserError whose text has all parts."""
    return pytest.raises(UserError, match='(?s)' + ''.join(f'(?=.*{p})' for p in parts))


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


@pytest.mark.parametrize(
    'content, parts',
    [
        ('{"images"', ('a.json is not JSON', 'line 1')),
        ('[]', ('no COCO annotation file: no list of images, annotations, categories',)),
        ('{"images": [], "annotations": {}}', ('no list of annotations, categories',)),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', ('lists no images',)),
        (
            '{"images": [{"id": 1}, 5], "annotations": [], "categories": []}',
            (
                'images that cannot be used',
                '1 without width, height, file_name: number 1',
                '1 without id, width, height, file_name: number 2',
            ),
        ),
    ],
)
def test_broken_annotation_files(tmp_path, content, parts):
    path = tmp_path / 'a.json'
    path.write_text(content)
    with refused(*parts):
        read_truth(path)


def test_missing_annotation_file(tmp_path):
    with refused('There is no annotation file .*a.json'):
        read_truth(tmp_path / 'a.json')
    with refused('cannot be read: Is a directory'):
        read_truth(tmp_path)


@pytest.mark.parametrize(
    'data, parts',
    [
        (spoilt('annotations', area=None), ('annotations that cannot be used', 'without area')),
        (spoilt('annotations', id=0), ('1 id 0, which COCO evaluation takes',)),
        (spoilt('annotations', id=2), ('annotations with the same id', 'id 2')),
        (spoilt('annotations', image_id=99), ('of an image that is not in the file: id 1',)),
        (spoilt('annotations', category_id=99), ('of a category that is not in the file: id 1',)),
        (spoilt('annotations', segmentation=None), ('1 without a segmentation: id 1', '--boxes')),
        (spoilt('annotations', segmentation=[]), ('1 without a segmentation: id 1',)),
        (spoilt('annotations', segmentation={'size': [80, 60], 'counts': ''}), ('whose mask has another size',)),
        (spoilt('categories', name='dog'), ('categories with the same name', 'dog')),
        (spoilt('images', id=2), ('images with the same id', 'id 2')),
    ],
)
def test_annotations_that_cannot_be_evaluated(tmp_path, data, parts):
    with refused(*parts):
        read_truth(write(tmp_path / 'a.json', data))


def test_boxes_need_no_masks(tmp_path):
    path = write(tmp_path / 'a.json', spoilt('annotations', segmentation=None))
    assert read_truth(path, masks=False).counts[CAT] == 1


def test_many_problems_of_one_kind_are_one_line(tmp_path):
    data = data_set([(1, CAT, A)] * 20)
    for annotation in data['annotations']:
        annotation['category_id'] = 5
    with refused(r'20 of a category that is not in the file: id 1, id 2, .*, … \(20 in all\)'):
        read_truth(write(tmp_path / 'a.json', data))


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
    'content, parts',
    [
        ('', ('p.json is not JSON',)),
        ('[]', ('p.json is an empty list: nothing was predicted, so every AP is 0',)),
        ('{}', ('a COCO result file is a list',)),
        ('{"annotations": []}', ('a COCO result file is a list', 'not a data set')),
    ],
)
def test_files_without_rows(tmp_path, content, parts):
    path = tmp_path / 'p.json'
    path.write_text(content)
    with refused(*parts):
        read_rows(path)


def test_missing_file(tmp_path):
    with refused('There is no file of predictions'):
        read_rows(tmp_path / 'p.json')


def changed(**changes) -> list[dict]:
    rows = copy.deepcopy(ROWS)
    for key, value in changes.items():
        rows[1][key] = value
        if value is None:
            del rows[1][key]
    return rows


@pytest.mark.parametrize(
    'rows, parts',
    [
        (changed(image_id=99), ('1 of 2 image ids are not in made.json', 'image id 99: 1 predictions')),
        (
            [{**r, 'image_id': 90 + r['image_id']} for r in ROWS],
            ('none of the 2 image ids is in made.json', 'of the split that was predicted'),
        ),
        (changed(category_id=1), ('1 of 2 category ids are not', 'not label numbers: 7 cat, 2 dog')),
        (changed(score=None), ('1 without score: row 2',)),
        (changed(score=float('nan')), ('whose score is no number: row 2',)),
        (changed(score='0.5'), ('whose score is no number: row 2',)),
        (changed(image_id=None), ('1 without image_id: row 2',)),
        (changed(image_id=[1]), ('whose image_id or category_id is no id: row 2',)),
        (changed(segmentation=[[1, 2, 3, 4, 5, 6]]), ('not in run lengths: .*: row 2',)),
        (changed(segmentation={'size': [60], 'counts': 'a'}), ('not in run lengths',)),
        (
            changed(segmentation={'size': [80, 60], 'counts': ROWS[1]['segmentation']['counts']}),
            (r'another size \(height, width\) than its image: row 2 \[80, 60\] in image 2 of \[60',),
        ),
        (changed(segmentation={'size': [60, 80], 'counts': 'hello world'}), ('1 whose mask is damaged: row 2: ',)),
        (changed(segmentation={'size': [60, 80], 'counts': [9000, 9000]}), ('1 whose mask is damaged: row 2: ',)),
        (
            changed(file_name='train/image_7.png'),
            ('of another split.: row 2 of train/image_7.png, image 2 is image_2.png', '--ann'),
        ),
        ([*ROWS, 5], ('1 that are no JSON objects: row 3',)),
    ],
)
def test_rows_that_cannot_be_evaluated(truth, rows, parts):
    with refused('p.json', *parts):
        checked_rows(Path('p.json'), rows, truth, 'segm')


@pytest.mark.parametrize(
    'box', [[1, 2, 3], [1, 2, -3, 4], [1, 2, 3, None], 'box', [1, 2, 3, float('inf')], [True, 2, 3, 4]]
)
def test_boxes_that_cannot_be_evaluated(truth, box):
    rows = [*rows_of([(1, CAT, A, 0.9)], 'bbox'), {**ROWS[0], 'bbox': box}]
    with refused('whose bbox is not left, top, width, height: row 2'):
        checked_rows(Path('p.json'), rows, truth, 'bbox')


def test_the_other_kind_of_file(truth):
    with refused('no segmentation in any row; it holds boxes: pass it with --boxes'):
        checked_rows(Path('p.json'), rows_of([(1, CAT, A, 0.9)], 'bbox'), truth, 'segm')
    with refused('no bbox in any row'):
        checked_rows(Path('p.json'), ROWS, truth, 'bbox')


def test_folder_of_the_images(tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'pictures').mkdir()
    truth = read_truth(write(tmp_path / 'annotations' / 'a.json', data_set(THINGS)))
    assert image_folder(truth, None) is None
    Image.new('RGB', (80, 60)).save(tmp_path / 'pictures' / 'image_1.png')
    with refused('pictures lacks 1 of 2 images', 'image_2.png', '--no-pictures'):
        image_folder(truth, tmp_path / 'pictures')
    Image.new('RGB', (80, 60)).save(tmp_path / 'pictures' / 'image_2.png')
    assert image_folder(truth, tmp_path / 'pictures') == tmp_path / 'pictures'
    assert image_folder(truth, None) is None
    for image in (tmp_path / 'pictures').iterdir():
        image.rename(tmp_path / image.name)
    assert image_folder(truth, None) == tmp_path
    assert json.loads(truth.path.read_text())  # it was only read
