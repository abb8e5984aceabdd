from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfinetune.data import coco_json
from mmfinetune.data.preflight import Split, read_split
from mmfinetune.utils.errors import UserError
from tests.builders.errors import codes, refused

CLASSES = ('cat', 'dog')


class Data:
    """Three images of 40x30: one with an object, one with a crowd region only, one with nothing."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / 'instances.json'
        self.images = [
            {'id': i, 'file_name': f'{i}.{kind}', 'width': 40, 'height': 30}
            for i, kind in ((1, 'jpg'), (2, 'png'), (3, 'jpg'))
        ]
        self.annotations = [self.annotation(1, 1, 1), self.annotation(2, 1, 5), self.annotation(3, 2, 1, iscrowd=1)]
        self.categories = [{'id': 1, 'name': 'cat'}, {'id': 5, 'name': 'dog'}]
        for image in self.images:
            self.draw(image['file_name'])

    @staticmethod
    def annotation(number: int, image: int, category: int, iscrowd: int = 0) -> dict:
        return {
            'id': number,
            'image_id': image,
            'category_id': category,
            'iscrowd': iscrowd,
            'bbox': [1, 1, 5, 5],
            'area': 25,
            'segmentation': [[1, 1, 6, 1, 6, 6]],
        }

    def draw(self, name: str, size: tuple[int, int] = (40, 30)) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(self.root / name)
        return self.root / name

    def write(self) -> None:
        self.path.write_text(
            json.dumps({'images': self.images, 'annotations': self.annotations, 'categories': self.categories})
        )

    def read(self, classes=CLASSES) -> Split:
        self.write()
        return read_split(self.path, self.root, classes)

    def error(self, code: str, classes=CLASSES) -> UserError:
        with refused(code, path=self.path) as caught:
            self.read(classes)
        assert caught.value.hint
        return caught.value


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def test_counts(data):
    # The crowd region alone gives an image nothing to train on.
    assert data.read() == Split(data.path, images=3, annotations=3, usable=1, classes=CLASSES)


def test_classes_need_not_be_given(data):
    assert data.read(None).classes == CLASSES
    assert data.read(list(CLASSES)).classes == CLASSES


def test_annotation_of_an_image_that_is_not_listed_counts_for_no_image(data):
    data.annotations.append(data.annotation(4, 99, 1))
    assert data.read().usable == 1


def test_missing_iscrowd_is_not_a_crowd(data):
    del data.annotations[2]['iscrowd']
    data.annotations[2]['iscrowd'] = 0
    del data.annotations[0]['iscrowd']
    assert data.read().usable == 2


def test_no_file(tmp_path):
    with refused('coco-missing', path=tmp_path / 'no.json') as caught:
        read_split(tmp_path / 'no.json', tmp_path)
    assert 'prepare_voc.py' in caught.value.hint


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
        ('{"images": [], "annotations": [], "categories": []}', ['coco-no-images', 'coco-no-categories']),
        ('\ufeff{"images": [{}], "annotations": [], ' + ONE_CLASS + '}', ['coco-encoding']),
    ],
)
def test_broken_file(tmp_path, text, faults):
    path = tmp_path / 'a.json'
    path.write_text(text, encoding='utf-8')
    with refused('coco-file', path=path) as caught:
        read_split(path, tmp_path)
    assert codes(caught.value.problems) == faults
    assert codes(coco_json.read(path).faults) == faults


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
    (problem,) = data.error('coco-entries').problems
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
    data.read()
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
    assert coco.classes == CLASSES
    assert {i: [a['id'] for a in found] for i, found in coco.by_image.items()} == {1: [1, 2], 2: [3], 3: []}
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
        read_split(path, tmp_path)
    assert codes(caught.value.problems) == ['coco-encoding']


@pytest.mark.parametrize('classes', [('dog', 'cat'), ('cat',), ('cat', 'dog', 'cow'), ('cat', 'Dog'), ()])
def test_other_classes_or_another_order(data, classes):
    error = data.error('coco-classes', classes)
    assert (error.facts['config'], error.facts['file']) == (', '.join(classes), 'cat, dog')
    assert 'num_classes' in error.hint


def test_order_is_that_of_the_file_not_of_the_ids(data):
    data.categories.reverse()
    assert data.read(('dog', 'cat')).classes == ('dog', 'cat')
    data.error('coco-classes', ('cat', 'dog'))


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == 'missing':
        path.unlink()
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('<html>no image</html>')
    elif kind == 'half':
        path.write_bytes(content[: len(content) // 2])
    elif kind == 'last bytes gone':
        path.write_bytes(content[:-12])
    elif kind == 'end of zeros':  # a download that was allotted its size but not filled
        path.write_bytes(content[: len(content) // 2] + bytes(4096))
    elif kind == 'folder':
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize('name', ['1.jpg', '2.png'])
@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('missing', 'image-file-missing'),
        ('empty', 'image-file-empty'),
        ('text', 'image-file-other'),
        ('half', 'image-file-truncated'),
        ('last bytes gone', 'image-file-truncated'),
        ('end of zeros', 'image-file-truncated'),
        ('folder', 'image-file-unreadable'),
    ],
)
def test_image_that_cannot_be_used(data, name, kind, expected):
    spoil(data.root / name, kind)
    data.write()
    assert read_split(data.path).images == 3
    error = data.error('coco-images')
    assert (error.facts['bad'], error.facts['count']) == (1, 3)
    (problem,) = error.problems
    assert (problem.code, problem.facts['place']) == (expected, str(data.root / name))


def test_image_of_another_size(data):
    data.draw('1.jpg', (50, 30))
    (problem,) = data.error('coco-images').problems
    assert problem.code == 'image-size'
    assert problem.facts == {'path': data.root / '1.jpg', 'found': '50x30', 'listed': '40x30'}


def test_image_that_exif_turns(data):
    # Its header says 30x40, and mmcv turns it to 40x30 when it loads it.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (30, 40)).save(data.root / '1.jpg', exif=exif)
    assert data.read().images == 3


def test_bytes_after_the_end_of_a_jpeg_are_harmless(data):
    path = data.root / '1.jpg'
    path.write_bytes(path.read_bytes() + bytes(100))
    assert data.read().images == 3


def test_all_images_at_once(data):
    for image in data.images:
        (data.root / image['file_name']).unlink()
    assert len(data.error('coco-images').problems) == 3


def test_real_coco(real_data):
    root = real_data / 'coco2017_real'
    split = read_split(root / 'annotations/instances_val2017.json', root / 'val2017')
    assert (split.images, len(split.classes)) == (40, 80)
    assert 0 < split.usable <= 40
    assert split.classes[:2] == ('person', 'bicycle')
