"""Sizes and pixels of image files, read as training reads them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmfinetune.data.check.images import look_at
from mmfinetune.utils.images import image_size, read_pixels
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import faulty


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
    'make, code',
    [
        (lambda d: d / 'none.jpg', 'missing'),
        (lambda d: written(d / 'a.jpg', b''), 'empty'),
        (lambda d: written(d / 'a.jpg', b'hello'), 'unknown'),
        (lambda d: written(d / 'a.jpg', b'<html>Please log in</html>'), 'other'),
        (lambda d: written(d / 'a.jpg', b'version https://git-lfs.github.com/spec/v1\n'), 'other'),
        (lambda d: cut(noise(d / 'a.jpg'), 0.6), 'truncated'),
        (lambda d: cut(noise(d / 'a.png'), 0.6), 'truncated'),
        (lambda d: cut(noise(d / 'a.png'), 0.001), 'unreadable'),
        (lambda d: d, 'unreadable'),
        (lambda d: save(d / 'a.tif', orientation=6), 'turned'),
        (lambda d: save(d / 'a.webp', orientation=8), 'turned'),
    ],
)
def test_size_of_a_bad_image_is_a_short_reason(tmp_path, make, code):
    with faulty(f'image-file-{code}') as caught:
        image_size(make(tmp_path))
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 120


@pytest.mark.parametrize('colours, mode', [(False, 'P'), (True, 'RGB')])
def test_pixels_are_those_stored(tmp_path, colours, mode):
    stored = Image.new('P', (5, 4), 3)
    stored.putpalette(bytes(range(12)))
    stored.save(tmp_path / 'a.png')
    pixels, found, file_format = read_pixels(tmp_path / 'a.png', colours)
    assert (found, file_format, pixels.shape[:2]) == (mode, 'PNG', (4, 5))
    assert pixels[0, 0].tolist() == ([9, 10, 11] if colours else 3)
    with faulty('image-file-missing'):
        read_pixels(tmp_path / 'b.png')
    with faulty('image-file-unreadable'):
        read_pixels(cut(noise(tmp_path / 'c.png'), 0.6))


@pytest.mark.parametrize('kind', STRANGE)
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = strange(tmp_path / 'a.png', kind)
    for read in (image_size, read_pixels):
        with faulty('image-file-unreadable'):
            read(path)


def test_what_opencv_refuses(tmp_path):
    path = tmp_path / 'a.png'
    Image.new('1', ((1 << 20) + 1, 1)).save(path)
    assert look_at(path).problem == 'image-unreadable'
    with faulty('image-file-huge'):
        image_size(path)
    Image.new('1', (1 << 20, 1)).save(path)
    assert look_at(path).problem == ''
    assert image_size(path) == (1 << 20, 1)
