"""Whatever a file holds, a check ends with a finding of its own: no traceback, no endless loop."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.check import report as data_check_report
from mmfinetune.data.check.run import Options, check
from mmfinetune.data.preflight import read_split
from mmfinetune.utils.errors import UserError
from tests.builders.errors import refused

SECONDS = 20
WIDTH, HEIGHT = 60, 40
# A set of two images has few objects of each class, of which the clean one tells too.
ALWAYS = {'class-rare'}
ELLIPSE = [20.0, 5.0, 28.0, 9.0, 30.0, 18.0, 25.0, 26.0, 14.0, 25.0, 8.0, 16.0, 11.0, 8.0]


def annotation(number: int, image: int, category: int) -> dict:
    rle = mask_api.merge(mask_api.frPyObjects([ELLIPSE], HEIGHT, WIDTH))
    return {
        'id': number,
        'image_id': image,
        'category_id': category,
        'iscrowd': 0,
        'bbox': [8.0, 5.0, 22.0, 21.0],
        'area': float(mask_api.area(rle)),
        'segmentation': [list(ELLIPSE)],
    }


def rle_annotation(number: int, image: int, category: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order='F')
    mask[20:35, 30:50] = 1
    mask[20:25, 30:40] = 0
    rle = mask_api.encode(mask)
    return {
        'id': number,
        'image_id': image,
        'category_id': category,
        'iscrowd': 0,
        'bbox': [30, 20, 20, 15],
        'area': int(mask.sum()),
        'segmentation': {'size': [HEIGHT, WIDTH], 'counts': rle['counts'].decode()},
    }


def clean() -> dict:
    return {
        'images': [
            {'id': 1, 'file_name': 'a.jpg', 'width': WIDTH, 'height': HEIGHT},
            {'id': 2, 'file_name': 'b.png', 'width': WIDTH, 'height': HEIGHT},
        ],
        'annotations': [annotation(1, 1, 1), rle_annotation(2, 1, 2), annotation(3, 2, 2), rle_annotation(4, 2, 1)],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
    }


def pixels(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def site(folder: Path) -> dict:
    pixels(0).save(folder / 'a.jpg')
    pixels(1).save(folder / 'b.png')
    return clean()


Edit = Callable[[dict], object]
Spoil = Callable[[Path], object]


def first(**changes: object) -> Edit:
    """Changes of the first annotation."""
    return lambda data: data['annotations'][0].update(changes)


def second(**changes: object) -> Edit:
    return lambda data: data['annotations'][1].update(changes)


def image(**changes: object) -> Edit:
    return lambda data: data['images'][0].update(changes)


def category(**changes: object) -> Edit:
    return lambda data: data['categories'][0].update(changes)


def without(section: str, key: str) -> Edit:
    return lambda data: data[section][0].pop(key)


def segmentation(shape: object) -> Edit:
    return first(segmentation=shape)


def counts(value: object) -> Edit:
    return second(segmentation={'size': [HEIGHT, WIDTH], 'counts': value})


def image_id(value: object) -> Edit:
    """An image id with its annotations, so that only the id is wrong."""

    def edit(data: dict) -> None:
        data['images'][0]['id'] = value
        for entry in data['annotations'][:2]:
            entry['image_id'] = value

    return edit


def far(distance: float) -> list[list[float]]:
    return [[0.0, 0.0, distance, 0.0, distance, distance]]


def smooth(points: int) -> list[float]:
    """`ELLIPSE` with points between its own."""
    corners = np.reshape(ELLIPSE, (-1, 2))
    at = np.linspace(0, len(corners), points, endpoint=False)
    following = np.roll(corners, -1, 0)
    whole = at.astype(int)
    return (corners[whole] + (at - whole)[:, None] * (following - corners)[whole]).ravel().tolist()


BOM = b'\xef\xbb\xbf'
NAN, INF = float('nan'), float('inf')

# Name, the bytes of the file made of those of the clean one, code of the finding.
FILES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ('truncated JSON', lambda b: b[:-40], 'not-json'),
    ('empty file', lambda b: b'', 'not-json'),
    ('blank file', lambda b: b' \n', 'not-json'),
    ('not JSON', lambda b: b'<html>sign in</html>', 'not-json'),
    ('JSON lines', lambda b: b'{}\n{}\n', 'not-json'),
    ('bytes after the end', lambda b: b + b'}', 'not-json'),
    ('an integer of too many digits', lambda b: b.replace(b'"id": 1', b'"id": ' + b'9' * 9999, 1), 'not-json'),
    ('list at the top', lambda b: b'[' + b + b']', 'top-level'),
    ('number at the top', lambda b: b'7', 'top-level'),
    ('null at the top', lambda b: b'null', 'top-level'),
    ('string at the top', lambda b: b'"images"', 'top-level'),
    ('byte order mark', lambda b: BOM + b, 'encoding'),
    ('UTF-16', lambda b: b.decode().encode('utf-16'), 'encoding'),
    ('UTF-32', lambda b: b.decode().encode('utf-32'), 'encoding'),
    ('Latin-1', lambda b: b.replace(b'cat', b'c\xe4t'), 'encoding'),
    ('random bytes', lambda b: bytes(range(128, 256)) * 9, 'encoding'),
    ('deeply nested lists', lambda b: b'[' * 200_000 + b']' * 200_000, 'nesting'),
    ('deeply nested objects', lambda b: b'{"a":' * 200_000 + b'1' + b'}' * 200_000, 'nesting'),
    ('an empty object', lambda b: b'{}', 'section-missing'),
]


def huge(data: dict) -> None:
    """Of no known image size, so that nothing but the run itself is wrong."""
    side = 1 << 16
    del data['images'][0]['width'], data['images'][0]['height']
    entry = next(a for a in data['annotations'] if a['image_id'] == data['images'][0]['id'])
    entry['segmentation'] = {'size': [side, side], 'counts': [side * side]}


# Name, change of the clean data, code of the finding; None where nothing is wrong.
ENTRIES: list[tuple[str, Edit, str | None]] = [
    ('clean', lambda d: None, None),
    ('no images key', lambda d: d.pop('images'), 'section-missing'),
    ('no annotations key', lambda d: d.pop('annotations'), 'section-missing'),
    ('no categories key', lambda d: d.pop('categories'), 'section-missing'),
    ('images null', lambda d: d.update(images=None), 'section-type'),
    ('annotations an object', lambda d: d.update(annotations={'1': {}}), 'section-type'),
    ('categories a string', lambda d: d.update(categories='cat dog'), 'section-type'),
    ('no images', lambda d: d.update(images=[]), 'no-images'),
    ('no annotations', lambda d: d.update(annotations=[]), 'no-objects'),
    ('no categories', lambda d: d.update(categories=[]), 'no-categories'),
    ('an image that is a string', lambda d: d['images'].append('c.jpg'), 'entry-type'),
    ('an annotation that is null', lambda d: d['annotations'].append(None), 'entry-type'),
    ('an annotation that is a list', lambda d: d['annotations'].append([1, 2]), 'entry-type'),
    ('a category that is a number', lambda d: d['categories'].append(3), 'entry-type'),
    # Categories
    (
        'gaps in category ids',
        lambda d: (category(id=90)(d), first(category_id=90)(d), d['annotations'][3].update(category_id=90)),
        None,
    ),
    ('duplicate category name', category(name='dog'), 'category-name-duplicate'),
    ('duplicate category id', category(id=2), 'category-id-duplicate'),
    ('category without name', without('categories', 'name'), 'category-name'),
    ('category name null', category(name=None), 'category-name'),
    ('category name a list', category(name=['cat']), 'category-name'),
    ('category name empty', category(name=' '), 'category-name'),
    ('category name a lone surrogate', category(name='\ud800'), 'category-name'),
    ('category without id', without('categories', 'id'), 'category-id-missing'),
    ('category id a string', category(id='1'), 'category-id-type'),
    ('category id a list', category(id=[1]), 'category-id-type'),
    ('category id negative', category(id=-1), 'category-id-range'),
    (
        'category id 0',
        lambda d: (category(id=0)(d), first(category_id=0)(d), d['annotations'][3].update(category_id=0)),
        'category-id-zero',
    ),
    ('a class called background', category(name='__background__'), 'background-class'),
    ('a class called <script>', category(name='<script>alert(1)</script>'), None),
    ('a class with a line break', category(name='cat\n\x1b[31m'), None),
    # Images
    ('image id a string', image_id('1'), 'image-id-type'),
    ('image id a float', image_id(1.5), 'image-id-type'),
    ('image id a truth value', image_id(True), 'image-id-type'),
    ('image id a list', image(id=[1]), 'image-id-type'),
    ('image id negative', image_id(-5), 'image-id-range'),
    ('image id huge', image_id(2**63), 'image-id-range'),
    ('image id immense', image_id(10**400), 'image-id-range'),
    ('image id large', image_id(2**62), None),
    ('image without id', without('images', 'id'), 'image-id-missing'),
    ('image id twice', image(id=2), 'image-id-duplicate'),
    ('image listed twice', lambda d: d['images'].append({**d['images'][0], 'id': 3}), 'image-listed-twice'),
    ('image without size', without('images', 'width'), 'image-size-invalid'),
    ('negative size', image(width=-60), 'image-size-invalid'),
    ('size zero', image(height=0), 'image-size-invalid'),
    ('size a string', image(height='40'), 'image-size-invalid'),
    ('size a float', image(height=40.5), 'image-size-invalid'),
    ('size huge', image(height=10**12), 'image-size-invalid'),
    ('size NaN', image(height=NAN), 'image-size-invalid'),
    ('file_name null', image(file_name=None), 'file-name'),
    ('file_name empty', image(file_name=''), 'file-name'),
    ('file_name missing', without('images', 'file_name'), 'file-name'),
    ('file_name a number', image(file_name=1), 'file-name'),
    ('file_name a list', image(file_name=['a.jpg']), 'file-name'),
    ('file_name with NUL', image(file_name='a\0.jpg'), 'file-name'),
    ('file_name a lone surrogate', image(file_name='\udfff.jpg'), 'file-name'),
    ('file_name too long', image(file_name='a' * 5000), 'image-unreadable'),
    ('file_name of nothing', image(file_name='z.jpg'), 'image-missing'),
    ('file_name absolute', image(file_name='/nowhere/a.jpg'), 'file-name-outside'),
    ('file_name of Windows', image(file_name='C:\\photos\\a.jpg'), 'file-name-outside'),
    ('file_name with ..', image(file_name='../a.jpg'), 'file-name-outside'),
    ('file_name with dots in it', image(file_name='a..b.jpg'), 'image-missing'),
    # Annotations
    ('annotation without id', without('annotations', 'id'), 'annotation-id-missing'),
    ('annotation id 0', first(id=0), 'annotation-id-zero'),
    ('annotation id twice', first(id=2), 'annotation-id-duplicate'),
    ('annotation id a string', first(id='a'), 'annotation-id-type'),
    ('annotation id a float', first(id=1.0), 'annotation-id-type'),
    ('annotation id false', first(id=False), 'annotation-id-type'),
    ('annotation id null', first(id=None), 'annotation-id-type'),
    ('annotation id an object', first(id={'$oid': '5f'}), 'annotation-id-type'),
    ('annotation id negative', first(id=-1), 'annotation-id-range'),
    ('annotation id huge', first(id=2**64), 'annotation-id-range'),
    ('unknown image', first(image_id=77), 'image-id-unknown'),
    ('no image_id', without('annotations', 'image_id'), 'image-id-unknown'),
    ('image a list', first(image_id=[1]), 'image-id-unknown'),
    ('unknown category', first(category_id=77), 'category-id-unknown'),
    ('category an object', first(category_id={'id': 1}), 'category-id-unknown'),
    ('bbox of 3 numbers', first(bbox=[1, 2, 3]), 'box-invalid'),
    ('bbox of 5 numbers', first(bbox=[1, 2, 3, 4, 5]), 'box-invalid'),
    ('bbox of strings', first(bbox=['8', '5', '22', '21']), 'box-invalid'),
    ('bbox a string', first(bbox='8 5 22 21'), 'box-invalid'),
    ('bbox an object', first(bbox={'x': 1}), 'box-invalid'),
    ('bbox null', first(bbox=None), 'box-invalid'),
    ('no bbox', without('annotations', 'bbox'), 'box-invalid'),
    ('bbox NaN', first(bbox=[8, 5, NAN, 21]), 'box-invalid'),
    ('bbox infinite', first(bbox=[8, 5, INF, 21]), 'box-invalid'),
    ('bbox immense', first(bbox=[8, 5, 10**400, 21]), 'box-invalid'),
    ('bbox negative', first(bbox=[8, 5, -22, 21]), 'box-degenerate'),
    ('bbox without height', first(bbox=[8, 5, 22, 0]), 'box-degenerate'),
    ('bbox under a pixel', first(bbox=[8, 5, 22, 0.3]), 'box-tiny'),
    ('bbox outside', first(bbox=[800, 500, 22, 21]), 'box-outside'),
    ('bbox as corners', first(bbox=[38, 25, 60, 40]), 'box-over-edge'),
    ('bbox elsewhere', first(bbox=[1, 5, 22, 21]), 'box-mask'),
    ('no area', without('annotations', 'area'), 'area-invalid'),
    ('area a string', first(area='9'), 'area-invalid'),
    ('area NaN', first(area=NAN), 'area-invalid'),
    ('area immense', first(area=10**400), 'area-invalid'),
    ('area zero', first(area=0), 'area-zero'),
    ('area negative', first(area=-3.5), 'area-zero'),
    ('area of the bbox', first(area=462), 'area-mismatch'),
    ('no iscrowd', without('annotations', 'iscrowd'), 'iscrowd-missing'),
    ('iscrowd 2', first(iscrowd=2), 'iscrowd-value'),
    ('iscrowd a string', first(iscrowd='0'), 'iscrowd-value'),
    ('iscrowd null', first(iscrowd=None), 'iscrowd-value'),
    ('iscrowd true', first(iscrowd=True), 'iscrowd-value'),
    ('iscrowd an object', first(iscrowd={'a': 1}), 'iscrowd-value'),
    ('crowd of polygons', first(iscrowd=1), 'crowd-polygon'),
    # Masks
    ('no segmentation', without('annotations', 'segmentation'), 'mask-missing'),
    ('segmentation null', segmentation(None), 'mask-missing'),
    ('no polygons', segmentation([]), 'mask-missing'),
    ('segmentation an empty object', segmentation({}), 'mask-missing'),
    ('segmentation a string', segmentation('8,5,30,26'), 'mask-type'),
    ('segmentation a number', segmentation(5), 'mask-type'),
    ('segmentation a flat list', segmentation(ELLIPSE), 'mask-type'),
    ('segmentation nested too deeply', segmentation([[ELLIPSE]]), 'mask-type'),
    ('polygon of pairs', segmentation([[[8, 5], [30, 5], [30, 26]]]), 'mask-type'),
    ('polygon of strings', segmentation([['8', '5', '30', '5', '30', '26']]), 'mask-type'),
    ('polygon a string', segmentation(['abc']), 'mask-type'),
    ('polygon null', segmentation([None]), 'mask-type'),
    ('polygon an object', segmentation([{'x': 1}]), 'mask-type'),
    ('coordinate null', segmentation([[8, 5, None, 5, 30, 26]]), 'mask-type'),
    ('coordinate immense', segmentation([[8, 5, 10**400, 5, 30, 26]]), 'mask-type'),
    ('an empty polygon', segmentation([[]]), 'polygon-points'),
    ('an empty polygon beside a good one', segmentation([list(ELLIPSE), []]), 'polygon-points'),
    ('polygon of 1 point', segmentation([[8, 5]]), 'polygon-points'),
    ('polygon of 2 points', segmentation([[8, 5, 30, 26]]), 'polygon-points'),
    ('odd number of coordinates', segmentation([[*ELLIPSE, 9.0]]), 'polygon-odd'),
    ('polygon with NaN', segmentation([[8, 5, NAN, 5, 30, 26]]), 'polygon-number'),
    ('polygon with infinity', segmentation([[8, 5, 30, -INF, 30, 26]]), 'polygon-number'),
    ('polygon as far as 1e300', segmentation(far(1e300)), 'polygon-number'),
    ('polygon as far as 1e8', segmentation(far(1e8)), 'polygon-far'),
    ('polygon over the edge', segmentation(far(90.0)), 'polygon-over-edge'),
    ('polygon wholly outside', segmentation([[70, 50, 90, 50, 90, 55, 70, 55]]), 'mask-empty'),
    ('polygon on one line', segmentation([[8, 5, 30, 5, 20, 5]]), 'mask-empty'),
    ('polygon of one point', segmentation([[8, 5] * 4]), 'mask-empty'),
    ('polygon without pixel', segmentation([[8.1, 5.1, 8.3, 5.1, 8.3, 5.3]]), 'mask-empty'),
    ('a bow tie', segmentation([[8, 5, 30, 26, 30, 5, 8, 26]]), 'polygon-crossing'),
    ('100,000 points', segmentation([smooth(100_000)]), None),
    ('5,000 times around', segmentation([ELLIPSE * 5_000]), 'polygon-crossing'),
    ('20,000 polygons', segmentation([list(ELLIPSE) for _ in range(20_000)]), None),
    ('RLE without size', second(segmentation={'counts': 'abc'}), 'rle-size'),
    ('RLE of one run of 2^32 pixels', huge, 'rle-counts'),
    ('RLE of another size', second(segmentation={'size': [WIDTH, HEIGHT], 'counts': [2400]}), 'rle-size'),
    ('RLE of size 0', second(segmentation={'size': [0, 0], 'counts': []}), 'rle-size'),
    ('RLE of negative size', second(segmentation={'size': [-40, 60], 'counts': [2400]}), 'rle-size'),
    ('RLE size of strings', second(segmentation={'size': ['40', '60'], 'counts': [2400]}), 'rle-size'),
    ('RLE size of 3', second(segmentation={'size': [40, 60, 1], 'counts': [2400]}), 'rle-size'),
    ('RLE without counts', second(segmentation={'size': [HEIGHT, WIDTH]}), 'rle-counts'),
    ('RLE counts null', counts(None), 'rle-counts'),
    ('RLE counts empty', counts(''), 'rle-counts'),
    ('RLE counts an empty list', counts([]), 'rle-counts'),
    ('RLE too short', counts([100, 50]), 'rle-counts'),
    ('RLE too long', counts([100, 50, 9999]), 'rle-counts'),
    ('RLE with a negative run', counts([100, -50, 2350]), 'rle-counts'),
    ('RLE of floats', counts([100.0, 50.0, 2250.0]), 'rle-counts'),
    ('RLE string garbage', counts('!!!~~~'), 'rle-counts'),
    ('RLE string of other letters', counts('ααα'), 'rle-counts'),
    ('RLE string that never ends', counts('oooooooooooooooooooooooo'), 'rle-counts'),
    ('RLE string cut short', counts(rle_annotation(1, 1, 1)['segmentation']['counts'][:-2]), 'rle-counts'),
    ('RLE string of negative runs', counts('N2N2N2'), 'rle-counts'),
    ('uncompressed RLE', counts([0, 1, 1239, 100, 1060]), 'box-mask'),
    ('RLE without a pixel', counts([2400]), 'mask-empty'),
    ('the same object twice', lambda d: d['annotations'].append({**d['annotations'][0], 'id': 5}), 'object-duplicate'),
]


def replace(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, keep: float) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return spoil


def save(name: str, picture: Callable[[], Image.Image], **options: object) -> Spoil:
    return lambda folder: picture().save(folder / name, **options)


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return spoil


def folder_called(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def exif(orientation: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Spoil:
    def spoil(folder: Path) -> None:
        tags = Image.Exif()
        tags[0x0112] = orientation
        pixels(3, size).save(folder / 'a.jpg', exif=tags)

    return spoil


def forbid(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip('root may read everything')
    (folder / 'a.jpg').chmod(0)


def palette_with_gaps() -> Image.Image:
    picture = Image.fromarray(
        (np.arange(WIDTH * HEIGHT) % 7 * 40).astype(np.uint8).reshape(HEIGHT, WIDTH), 'L'
    ).convert('P')
    picture.putpalette([0, 0, 0] * 41 + [9, 200, 30] * 100)
    return picture


def bomb() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + checksum

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


IMAGES: list[tuple[str, Spoil, str | None]] = [
    ('no image', lambda f: (f / 'a.jpg').unlink(), 'image-missing'),
    ('zero bytes', replace('a.jpg', b''), 'image-unreadable'),
    ('text called .jpg', replace('a.jpg', b'hello'), 'image-unreadable'),
    ('a web page called .jpg', replace('a.jpg', b'<!DOCTYPE html><html></html>'), 'image-unreadable'),
    ('a Git LFS pointer', replace('a.jpg', b'version https://git-lfs.github.com/spec/v1\n'), 'image-unreadable'),
    ('JPEG header only', replace('a.jpg', b'\xff\xd8\xff\xe0'), 'image-unreadable'),
    ('half a JPEG', cut('a.jpg', 0.5), 'image-truncated'),
    ('JPEG without its last bytes', cut('a.jpg', 0.995), 'image-truncated'),
    ('half a PNG', cut('b.png', 0.5), 'image-truncated'),
    ('a PNG bomb', replace('b.png', bomb()), 'image-unreadable'),
    ('PNG called .jpg', save('a.jpg', pixels, format='PNG'), 'image-extension'),
    (
        '16-bit PNG',
        save('b.png', lambda: Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 20)),
        'image-depth',
    ),
    ('palette PNG with gaps', save('b.png', palette_with_gaps), None),
    ('grey PNG', save('b.png', lambda: pixels(4).convert('L')), None),
    ('black and white PNG', save('b.png', lambda: pixels(4).convert('1')), None),
    ('RGBA', save('b.png', lambda: pixels(4).convert('RGBA')), 'image-channels'),
    ('CMYK', save('a.jpg', lambda: pixels(4).convert('CMYK')), 'image-channels'),
    ('another size', save('a.jpg', lambda: pixels(4, (30, 20))), 'image-size'),
    ('EXIF turns it away', exif(6), 'image-exif'),
    ('EXIF turns it right', exif(6, (HEIGHT, WIDTH)), None),
    ('EXIF turns it over', exif(3), 'image-exif-same-size'),
    ('EXIF damaged', lambda f: pixels(4).save(f / 'a.jpg', exif=b'Exif\0\0MM\0*\xff\xff'), None),
    ('the same content twice', lambda f: pixels(1).save(f / 'a.jpg', format='PNG'), 'image-duplicate'),
    ('one colour', save('a.jpg', lambda: Image.new('RGB', (WIDTH, HEIGHT))), None),
    ('a folder called a.jpg', folder_called('a.jpg'), 'image-unreadable'),
    ('a loop of links', link('a.jpg', 'a.jpg'), 'image-unreadable'),
    ('a link to nothing', link('a.jpg', 'nothing.jpg'), 'image-missing'),
    ('an image that may not be read', forbid, 'image-unreadable'),
]


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """An endless loop is a failure, not a stop of all tests."""

    def stop(*_: object) -> None:
        raise TimeoutError(f'not done in {SECONDS} s')

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


def judge(path: Path, expected: str | None) -> None:
    """The check tells what is expected, and all that shows or heeds a report gets along with it."""
    report = check({'train': (path, path.parent)}, None, Options(cache=False, workers=1))
    found = report.codes() - ALWAYS
    if expected is None:
        assert not found
    else:
        assert expected in found, found
    assert report.good == (not report.of('error'))
    text = data_check_report.as_text(report)
    assert expected is None or f'[{expected}]' in text
    assert text.isprintable() or {c for c in text if not c.isprintable()} == {'\n'}
    json.dumps(report.as_dict(), allow_nan=False)
    page = data_check_report.as_html(report)
    page.encode()
    assert '<script>' not in page
    for act in (report.require_good, lambda: read_split(path, path.parent)):
        with contextlib.suppress(UserError):
            act()
    if report.of('error'):
        with refused('check-errors') as caught:
            report.require_good()
        assert len(caught.value.problems) == len(report.of('error'))


def test_enough_rows():
    rows = FILES + ENTRIES + IMAGES
    assert len(rows) >= 60
    assert len({name for name, _, _ in rows}) == len(rows)


@pytest.mark.parametrize(('make', 'expected'), [r[1:] for r in FILES], ids=[r[0] for r in FILES])
def test_malformed_file(tmp_path, make, expected):
    path = tmp_path / 'instances_train.json'
    path.write_bytes(make(json.dumps(site(tmp_path)).encode()))
    judge(path, expected)


@pytest.mark.parametrize(('edit', 'expected'), [r[1:] for r in ENTRIES], ids=[r[0] for r in ENTRIES])
def test_malformed_entry(tmp_path, edit, expected):
    data = copy.deepcopy(site(tmp_path))
    edit(data)
    path = tmp_path / 'instances_train.json'
    path.write_text(json.dumps(data))
    judge(path, expected)


@pytest.mark.parametrize(('spoil', 'expected'), [r[1:] for r in IMAGES], ids=[r[0] for r in IMAGES])
def test_malformed_image(tmp_path, spoil, expected):
    path = tmp_path / 'instances_train.json'
    path.write_text(json.dumps(site(tmp_path)))
    spoil(tmp_path)
    judge(path, expected)


def test_names_of_all_kinds_are_fine(tmp_path):
    data = site(tmp_path)
    names = ('naïve café 猫 (1).jpg', "b's %20 #2.png")
    for entry, name in zip(data['images'], names, strict=True):
        (tmp_path / entry['file_name']).rename(tmp_path / name)
        entry['file_name'] = name
    path = tmp_path / 'instances_train.json'
    path.write_text(json.dumps(data))
    judge(path, None)


@pytest.mark.parametrize(
    ('name', 'make'),
    [
        ('nothing there', lambda path: None),
        ('a folder', Path.mkdir),
        ('a loop of links', lambda path: path.symlink_to(path)),
    ],
)
def test_annotation_file_that_cannot_be_opened(tmp_path, name, make):
    path = tmp_path / 'instances_train.json'
    make(path)
    judge(path, 'no-file' if name == 'nothing there' else 'file-unreadable')


@pytest.mark.slow
def test_a_million_annotations(tmp_path):
    signal.alarm(240)
    data = site(tmp_path)
    entry = json.dumps(annotation(77777, 88888, 1))
    data['annotations'] = []
    path = tmp_path / 'instances_train.json'
    path.write_text(
        json.dumps(data).replace(
            '"annotations": []',
            '"annotations": ['
            + ','.join(entry.replace('77777', str(k)).replace('88888', str(1 + k % 2)) for k in range(1, 1_000_001))
            + ']',
        )
    )
    report = check({'train': (path, tmp_path)}, None, Options(cache=False, images=False))
    # All on top of each other: the worst case for the search of duplicates.
    finding = next(f for f in report.findings if f.code == 'object-duplicate')
    assert finding.count == 999_998
    assert report.splits[0].annotations == 1_000_000
