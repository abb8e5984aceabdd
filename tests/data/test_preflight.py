"""What a run checks in its annotation files before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmfinetune.data import preflight
from mmfinetune.data.preflight import Split, read_split
from mmfinetune.utils.errors import UserError
from tests.builders.coco import CocoData
from tests.builders.errors import refused

CLASSES = ('cat', 'dog')


@pytest.fixture
def data(tmp_path: Path) -> CocoData:
    return CocoData(tmp_path)


def read(data: CocoData, classes=CLASSES) -> Split:
    data.write()
    return read_split(data.path, data.root, classes)


def error_of(data: CocoData, code: str, classes=CLASSES) -> UserError:
    with refused(code, path=data.path) as caught:
        read(data, classes)
    assert caught.value.hint
    return caught.value


def test_counts(data):
    # The crowd region alone gives an image nothing to train on.
    assert read(data) == Split(data.path, images=3, annotations=3, usable=1, classes=CLASSES)


def test_classes_need_not_be_given(data):
    assert read(data, None).classes == CLASSES
    assert read(data, list(CLASSES)).classes == CLASSES


def test_annotation_of_an_image_that_is_not_listed_counts_for_no_image(data):
    data.annotations.append(data.annotation(4, 99, 1))
    assert read(data).usable == 1


def test_missing_iscrowd_is_not_a_crowd(data):
    del data.annotations[2]['iscrowd']
    data.annotations[2]['iscrowd'] = 0
    del data.annotations[0]['iscrowd']
    assert read(data).usable == 2


def test_names_that_mmdet_would_read_in_another_encoding(data, monkeypatch):
    monkeypatch.setattr(preflight.locale, 'getpreferredencoding', lambda _: 'gbk')
    data.categories[1]['name'] = 'größe'
    assert read(data, None).classes == ('cat', 'größe')  # escaped
    data.path.write_text(data.path.read_text().encode().decode('unicode_escape'), encoding='utf-8')
    with refused('coco-locale', path=data.path, encoding='gbk'):
        read_split(data.path, data.root, None)


def test_no_file(tmp_path):
    with refused('coco-missing', path=tmp_path / 'no.json') as caught:
        read_split(tmp_path / 'no.json', tmp_path)
    assert 'prepare_voc.py' in caught.value.hint


@pytest.mark.parametrize('classes', [('dog', 'cat'), ('cat',), ('cat', 'dog', 'cow'), ('cat', 'Dog'), ()])
def test_other_classes_or_another_order(data, classes):
    error = error_of(data, 'coco-classes', classes)
    assert (error.facts['config'], error.facts['file']) == (', '.join(classes), 'cat, dog')
    assert 'num_classes' in error.hint


def test_order_is_that_of_the_file_not_of_the_ids(data):
    data.categories.reverse()
    assert read(data, ('dog', 'cat')).classes == ('dog', 'cat')
    error_of(data, 'coco-classes', ('cat', 'dog'))


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
    error = error_of(data, 'coco-images')
    assert (error.facts['bad'], error.facts['count']) == (1, 3)
    (problem,) = error.problems
    assert (problem.code, problem.facts['place']) == (expected, str(data.root / name))


def test_image_of_another_size(data):
    data.draw('1.jpg', (50, 30))
    (problem,) = error_of(data, 'coco-images').problems
    assert problem.code == 'image-size'
    assert problem.facts == {'path': data.root / '1.jpg', 'found': '50x30', 'listed': '40x30'}


def test_image_that_exif_turns(data):
    # Its header says 30x40, and mmcv turns it to 40x30 when it loads it.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (30, 40)).save(data.root / '1.jpg', exif=exif)
    assert read(data).images == 3


def test_bytes_after_the_end_of_a_jpeg_are_harmless(data):
    path = data.root / '1.jpg'
    path.write_bytes(path.read_bytes() + bytes(100))
    assert read(data).images == 3


def test_all_images_at_once(data):
    for image in data.images:
        (data.root / image['file_name']).unlink()
    assert len(error_of(data, 'coco-images').problems) == 3


def test_real_coco(real_data):
    root = real_data / 'coco2017_real'
    split = read_split(root / 'annotations/instances_val2017.json', root / 'val2017')
    assert (split.images, len(split.classes)) == (40, 80)
    assert 0 < split.usable <= 40
    assert split.classes[:2] == ('person', 'bicycle')
