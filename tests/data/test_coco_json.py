from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfinetune.data.coco_json import Split, read_split
from mmfinetune.utils.errors import UserError

CLASSES = ('cat', 'dog')


class Data:
    """Three images of 40x30: one with an object, one with a crowd region only, one with nothing."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / 'instances.json'
        self.images = [
            {'id': i, 'file_name': f'{i}.{kind}', 'width': 40, 'height': 30}
            for i, kind in ((1, 'jpg'), (2, 'png'), (3, 'jpg'))
        ]
        self.annotations = [self.annotation(1, 1, 1), self.annotation(2, 1, 2), self.annotation(3, 2, 1, iscrowd=1)]
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

    def read(self, classes=CLASSES) -> Split:
        self.path.write_text(
            json.dumps({'images': self.images, 'annotations': self.annotations, 'categories': self.categories})
        )
        return read_split(self.path, self.root, classes)

    def error(self, classes=CLASSES) -> UserError:
        with pytest.raises(UserError) as caught:
            self.read(classes)
        assert str(self.path) in caught.value.message
        assert caught.value.cure
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


def test_missing_iscrowd_is_no_crowd(data):
    del data.annotations[2]['iscrowd']
    data.annotations[2]['iscrowd'] = 0
    del data.annotations[0]['iscrowd']
    assert data.read().usable == 2


def test_no_file(tmp_path):
    with pytest.raises(UserError, match='There is no annotation file') as caught:
        read_split(tmp_path / 'no.json', tmp_path)
    assert 'prepare_voc.py' in caught.value.cure


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('{"images": [', 'is no COCO annotation file'),
        ('', 'is no COCO annotation file'),
        ('[]', 'is no COCO annotation file'),
        ('{}', "key 'images' is missing"),
        ('{"images": [], "annotations": []}', "key 'categories' is missing"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "key 'name' is missing"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "key 'file_name' is missing"),
        ('{"images": [], "annotations": [{"id": 1}], "categories": []}', "key 'image_id' is missing"),
        ('{"images": 1, "annotations": 2, "categories": 3}', 'is no COCO annotation file'),
        ('{"images": [], "annotations": [], "categories": []}', 'lists no images'),
    ],
)
def test_broken_file(tmp_path, text, expected):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        read_split(path, tmp_path)
    assert str(path) in caught.value.message


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes(b'\x80\xff\x00' * 10)
    with pytest.raises(UserError, match='is no COCO annotation file'):
        read_split(path, tmp_path)


def test_annotation_id_zero(data):
    data.annotations[1]['id'] = 0
    error = data.error()
    assert 'annotation id 0 (image 1)' in error.message
    assert 'from 1' in error.cure


@pytest.mark.parametrize('classes', [('dog', 'cat'), ('cat',), ('cat', 'dog', 'cow'), ('cat', 'Dog'), ()])
def test_other_classes_or_another_order(data, classes):
    error = data.error(classes)
    assert 'in their order' in error.message
    assert error.problems == [f'config: {", ".join(classes)}', 'file:   cat, dog']
    assert 'num_classes' in error.cure


def test_order_is_that_of_the_file_not_of_the_ids(data):
    data.categories.reverse()
    assert data.read(('dog', 'cat')).classes == ('dog', 'cat')
    data.error(('cat', 'dog'))


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
        ('missing', 'missing'),
        ('empty', 'not an image'),
        ('text', 'not an image'),
        ('half', 'truncated'),
        ('last bytes gone', 'truncated'),
        ('end of zeros', 'truncated'),
        ('folder', 'directory'),
    ],
)
def test_image_that_cannot_be_used(data, name, kind, expected):
    spoil(data.root / name, kind)
    error = data.error()
    assert '1 of 3 images cannot be used' in error.message
    assert len(error.problems) == 1
    assert error.problems[0].startswith(f'{data.root / name}: ')
    assert expected in error.problems[0]


def test_image_of_another_size(data):
    data.draw('1.jpg', (50, 30))
    assert data.error().problems == [f'{data.root / "1.jpg"}: is 50x30, the annotation file says 40x30']


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
    assert len(data.error().problems) == 3


def test_real_coco(real_data):
    root = real_data / 'coco2017_real'
    split = read_split(root / 'annotations/instances_val2017.json', root / 'val2017')
    assert (split.images, len(split.classes)) == (40, 80)
    assert 0 < split.usable <= 40
    assert split.classes[:2] == ('person', 'bicycle')
