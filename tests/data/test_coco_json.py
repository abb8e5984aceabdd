"""The one reader of COCO annotation files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfinetune.data import coco_json
from tests.builders.coco import CocoData
from tests.builders.errors import codes, refused


@pytest.fixture
def data(tmp_path: Path) -> CocoData:
    return CocoData(tmp_path)


ONE_CLASS = '"categories": [{"id": 1, "name": "a"}]'


@pytest.mark.parametrize(
    ('text', 'faults'),
    [
        ('{"images": [', ['coco-not-json']),
        ('', ['coco-not-json']),
        ('[' * 100_000, ['coco-nesting']),
        ('[]', ['coco-top-level']),
        ('{}', ['coco-section-missing'] * 3),
        ('{"images": [{}], "annotations": []}', ['coco-section-missing']),
        ('{"images": 1, "annotations": 2, "categories": 3}', ['coco-section-type'] * 3),
        ('{"images": [{}, 5], "annotations": [], ' + ONE_CLASS + '}', ['coco-entry-type']),
        ('{"images": [{}], "annotations": [], "annotations": [], ' + ONE_CLASS + '}', ['coco-section-repeated']),
        ('{"images": [], "annotations": [], "categories": []}', ['coco-no-images', 'coco-no-categories']),
        ('\ufeff{"images": [{}], "annotations": [], ' + ONE_CLASS + '}', ['coco-encoding']),
    ],
)
def test_broken_file(tmp_path, text, faults):
    path = tmp_path / 'a.json'
    path.write_text(text, encoding='utf-8')
    with refused('coco-file', path=path) as caught:
        coco_json.read(path).require(utf8=True)
    assert codes(caught.value.problems) == faults
    assert codes(coco_json.read(path).faults) == faults


def test_the_name_of_a_section_elsewhere(data):
    data.images.append({'id': 50, 'file_name': 'a.jpg', 'images': [], 'annotations': {'annotations': 1}})
    data.categories.append({'id': 50, 'name': 'categories'})
    data.write()
    assert not coco_json.read(data.path).require().faults


@pytest.mark.parametrize(
    ('images', 'annotations', 'categories', 'found'),
    [
        ([{'id': 1}], [], [{'id': 1, 'name': 'a'}], ('images', 'file_name, width, height')),
        ([], [{'id': 1}], [], ('annotations', 'image_id, category_id')),
        ([], [], [{'id': 1}], ('categories', 'name')),
    ],
)
def test_keys_that_are_missing(data, images, annotations, categories, found):
    data.images += images
    data.annotations += annotations
    data.categories += categories
    data.write()
    with refused('coco-entries', path=data.path) as caught:
        coco_json.read(data.path).require(('width', 'height'))
    (problem,) = caught.value.problems
    assert problem.code == 'coco-keys-missing'
    assert (problem.facts['section'], problem.facts['keys'], problem.facts['count']) == (*found, 1)


@pytest.mark.parametrize(
    ('section', 'changes', 'code', 'places'),
    [
        ('images', {'id': 2}, 'coco-repeated', '2'),
        ('images', {'id': [2]}, 'coco-repeated', '[2]'),
        ('images', {'file_name': '2.png'}, 'coco-repeated', "'2.png'"),
        ('images', {'file_name': 3}, 'coco-file-name', 'file_name 3'),
        ('images', {'file_name': ''}, 'coco-file-name', 'file_name is empty'),
        ('images', {'file_name': 'a\0'}, 'coco-file-name', 'file_name has a NUL character'),
        ('images', {'file_name': '\ud800'}, 'coco-file-name', 'file_name is not valid Unicode'),
        ('categories', {'id': 5}, 'coco-repeated', '5'),
        ('categories', {'name': 'dog'}, 'coco-repeated', "'dog'"),
        ('categories', {'name': None}, 'coco-name', 'None'),
        ('annotations', {'id': 2}, 'coco-repeated', '2'),
        ('annotations', {'id': 0}, 'coco-id-zero', '1'),
        ('annotations', {'image_id': 99}, 'coco-link', '99'),
        ('annotations', {'category_id': {}}, 'coco-link', '{}'),
    ],
)
def test_contradictions(data, section, changes, code, places):
    getattr(data, section)[0].update(changes)
    data.write()
    coco = coco_json.read(data.path)
    assert not coco.faults
    with refused('coco-entries', path=data.path) as caught:
        coco.require(annotations=('id',), unique_files=True)
    assert (code, places) in [(p.code, p.facts['places']) for p in caught.value.problems]


def test_places_of_one_problem_are_one_line(data):
    data.annotations = [data.annotation(number, 90 + number, 1) for number in range(1, 21)]
    data.write()
    with refused('coco-entries') as caught:
        coco_json.read(data.path).require()
    (problem,) = caught.value.problems
    assert problem.facts == {'key': 'image_id', 'count': 20, 'places': '91, 92, 93, 94, 95, …'}


def test_views(data):
    data.write()
    coco = coco_json.read(data.path, compact=True).require()
    assert coco.classes == ('cat', 'dog')
    assert coco.annotations[0]['segmentation'][0].tolist() == [1, 1, 6, 1, 6, 6]
    assert coco_json.read(data.path).annotations[0]['segmentation'] == [[1, 1, 6, 1, 6, 6]]


def test_a_file_is_parsed_once_within_a_block_unless_it_changes(data):
    data.write()
    with coco_json.parsed_once():
        first = coco_json.read(data.path)
        with coco_json.parsed_once():
            assert coco_json.read(data.path).data is first.data
        data.images.pop()
        data.write()
        assert len(coco_json.read(data.path).images) == 2
    assert coco_json.read(data.path).data is not coco_json.read(data.path).data


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes(b'\x80\xff\x00' * 10)
    with refused('coco-file') as caught:
        coco_json.read(path).require(utf8=True)
    assert codes(caught.value.problems) == ['coco-encoding']
