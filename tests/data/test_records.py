"""Image sizes, file lists, masks and the checks of polygons and RLEs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.records import Instance, Item, Record
from mmfinetune.utils.files import find_files, natural_key, read_json, read_text
from mmfinetune.utils.images import find_images, image_size
from mmfinetune.utils.masks import mask_to_rle, masks_to_rles, polygon_problem, rle_problem, rle_runs


def save(path: Path, size: tuple[int, int] = (40, 20), orientation: int = 1, **options) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', size, (9, 99, 199)).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_size_is_that_which_training_sees(tmp_path, suffix, orientation):
    path = save(tmp_path / f'a.{suffix}', orientation=orientation)
    height, width = cv2.imread(str(path)).shape[:2]
    assert image_size(path) == (width, height)


@pytest.mark.parametrize('suffix', ['bmp', 'tif', 'ppm', 'jp2', 'pgm'])
def test_size_of_other_formats(tmp_path, suffix):
    path = tmp_path / f'a.{suffix}'
    Image.new('L' if suffix == 'pgm' else 'RGB', (30, 17)).save(path)
    assert image_size(path) == (30, 17)


def test_size_of_a_huge_image_needs_no_decoding(tmp_path):
    path = tmp_path / 'a.png'
    Image.new('1', (15000, 10000)).save(path)  # Pillow would warn of it
    assert image_size(path) == (15000, 10000)


def cut(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def noise(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    'make, reason',
    [
        (lambda d: d / 'none.jpg', 'missing'),
        (lambda d: written(d / 'a.jpg', b''), 'empty file'),
        (lambda d: written(d / 'a.jpg', b'hello'), 'not an image'),
        (lambda d: written(d / 'a.jpg', b'<html>Please log in</html>'), 'a web page'),
        (lambda d: written(d / 'a.jpg', b'version https://git-lfs.github.com/spec/v1\n'), 'Git LFS'),
        (lambda d: cut(noise(d / 'a.jpg'), 0.6), 'truncated JPEG'),
        (lambda d: cut(noise(d / 'a.png'), 0.6), 'truncated PNG'),
        (lambda d: cut(noise(d / 'a.png'), 0.001), '(unreadable|not an image)'),
        (lambda d: d, 'unreadable'),
        (lambda d: save(d / 'a.tif', orientation=6), 'a TIFF turned by its EXIF orientation'),
        (lambda d: save(d / 'a.webp', orientation=8), 'a WEBP turned by its EXIF orientation'),
    ],
)
def test_size_of_a_bad_image_is_a_short_reason(tmp_path, make, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        image_size(make(tmp_path))
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 120


def test_files_are_found_in_natural_order_without_hidden_ones(tmp_path):
    names = [
        'img10.jpg',
        'img2.JPG',
        'b/ünï çode 1.png',
        'b/.hidden.png',
        '.git/a.png',
        '__MACOSX/a.jpg',
        'notes.txt',
        'B/a.tiff',
        'b/img1.jpeg',
        'Thumbs.db',
        'c/01.bmp',
        'c/1.bmp',
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ['B/a.tiff', 'b/img1.jpeg', 'b/ünï çode 1.png', 'c/01.bmp', 'c/1.bmp', 'img2.JPG', 'img10.jpg']
    assert [path.name for path in find_files(tmp_path, {'.txt'})] == ['notes.txt']


def test_a_folder_is_walked_once_whatever_links_lead_to_it(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/1.png').touch()
    (tmp_path / 'a/loop').symlink_to(tmp_path)
    (tmp_path / 'self').symlink_to(tmp_path / 'self')
    elsewhere = tmp_path.with_name(tmp_path.name + '_elsewhere')
    elsewhere.mkdir()
    (elsewhere / '2.png').touch()
    (tmp_path / 'b').symlink_to(elsewhere)
    assert [path.name for path in find_images(tmp_path)] == ['1.png', '2.png']


def test_natural_keys_order_any_names():
    names = ['a', '10', '9', 'a10b2', 'a10b1', 'A2', '', '٣', '²']
    assert len({natural_key(name) for name in names}) == len(names)
    assert sorted(names, key=natural_key) == ['', '9', '10', 'a', 'A2', 'a10b1', 'a10b2', '²', '٣']


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
        runs = rle_runs(mask_to_rle(mask)['counts'])
        flat = mask.ravel(order='F')
        assert runs.sum() == flat.size
        assert (np.repeat(np.arange(len(runs)) % 2, runs) == flat).all()


W, H = 40, 20
GOOD = mask_to_rle(np.eye(H, W, dtype=np.uint8))


@pytest.mark.parametrize(
    'rle, reason',
    [
        (GOOD, None),
        ({'size': [H, W], 'counts': [0, H * W]}, None),
        ({'size': [H, W], 'counts': [H * W]}, None),
        ({'size': [W, H], 'counts': GOOD['counts']}, 'of size'),
        ({'size': [H, W]}, "without 'size'"),
        ([1, 2], "without 'size'"),
        ({'size': [H, W], 'counts': [1, 2]}, 'of 3 pixels for 800'),
        ({'size': [H, W], 'counts': []}, 'of 0 pixels'),
        ({'size': [H, W], 'counts': ''}, 'of 0 pixels'),
        ({'size': [H, W], 'counts': [H * W + 5, -5]}, 'negative'),
        ({'size': [H, W], 'counts': [10**30]}, 'longer than the image'),
        ({'size': [H, W], 'counts': [1.0, 799.0]}, 'neither a string nor'),
        ({'size': [H, W], 'counts': [True, 799]}, 'neither a string nor'),
        ({'size': [H, W], 'counts': None}, 'neither a string nor'),
        ({'size': [H, W], 'counts': GOOD['counts'][:-1]}, '(cut off|pixels|negative)'),
        ({'size': [H, W], 'counts': 'garbage!'}, '.'),
        ({'size': [H, W], 'counts': 'ünï'}, 'not ASCII'),
        ({'size': [H, W], 'counts': 'o' * 500}, '(cut off|no compressed RLE)'),
    ],
)
def test_rle_problems(rle, reason):
    problem = rle_problem(rle, W, H)
    if reason is None:
        assert problem is None
    else:
        import re

        assert problem and re.search(reason, problem)


@pytest.mark.parametrize(
    'points, reason',
    [
        ([0, 0, 5, 0, 5, 5], None),
        ([-3.5, -1, 41, 0, 20, 19.99], None),
        ([1, 1], None),
        ([], None),
        ([0, 0, 5, 0, 5], 'odd number of coordinates (5)'),
        ([0, 0, 5, 0, float('nan'), 5], 'NaN'),
        ([0, 0, 5, 0, float('inf'), 5], 'NaN or infinity'),
        ([0, 0, 5, 0, 10**400, 5], 'far outside the 40x20 image'),
        ([0, 0, 5, 0, 1e6, 5], 'far outside'),
        ([0, 0, 5, 0, -41, 5], 'far outside'),
        ([0, 0, '5', 0, 5, 5], "holds '5'"),
        ([0, 0, True, 0, 5, 5], 'holds True'),
        ([0, 0, None, 0, 5, 5], 'holds None'),
        ('0 0 5 0 5 5', 'is str'),
        (None, 'is NoneType'),
    ],
)
def test_polygon_problems(points, reason):
    problem = polygon_problem(points, W, H)
    assert problem is None if reason is None else reason in problem


@pytest.mark.parametrize('data, text', [('ä\n'.encode(), 'ä\n'), (b'\xef\xbb\xbfx', 'x'), ('ä'.encode('utf-16'), 'ä')])
def test_text_with_marks(tmp_path, data, text):
    assert read_text(written(tmp_path / 'a.txt', data)) == text


@pytest.mark.parametrize(
    'data, reason',
    [
        (b'', 'empty file'),
        (b' \n', 'empty file'),
        (b'{"a": [1,', 'line 1, column 10'),
        (b'{\n"a": x}', 'line 2'),
        (b'\xff\x00\xfe', 'not UTF-8'),
        (b'[' * 100_000, 'nested too deeply'),
    ],
)
def test_bad_json_is_a_short_reason(tmp_path, data, reason):
    with pytest.raises(ValueError, match=reason):
        read_json(written(tmp_path / 'a.json', data))
    with pytest.raises(ValueError, match='missing'):
        read_json(tmp_path / 'none.json')


def test_records_go_to_worker_processes():
    record = Record(Path('a.jpg'), 4, 3, [Instance('a', [[0, 0, 1, 0, 1, 1]])], 'train')
    item = Item('a', Path('a.jpg'), (1, 2))
    assert pickle.loads(pickle.dumps((record, item))) == (record, item)
    assert os.fspath(record.image) == 'a.jpg'
