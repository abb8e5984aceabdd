from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from scipy import ndimage

from mmfinetune.data.formats.masks import MIN_AREA, THRESHOLD, BinaryMasksReader, MaskPngReader
from mmfinetune.data.prepare import prepare
from mmfinetune.data.records import Record
from tests.builders.errors import codes, message, refused

HEIGHT, WIDTH = 40, 60
PALETTE = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes()


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, 'grey').save(path, **save)
    return path


def mask(path: Path, values: np.ndarray, mode: str = 'L') -> Path:
    """Write values as they are; mode 'P' with a palette of many colours, '16' with 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == '16':
        made = Image.fromarray(values.astype(np.uint16))
    elif mode == '1':
        made = Image.fromarray(values.astype(bool))
    else:
        made = Image.fromarray(values.astype(np.uint8))
        if mode == 'P':
            made.putpalette(PALETTE)
    assert made.mode == {'16': 'I;16'}.get(mode, mode)
    made.save(path)
    return path


def numbers(*values: int, seed: int = 0) -> np.ndarray:
    """An image of objects with these numbers: a block each, and pixels scattered over all."""
    made = np.zeros((HEIGHT, WIDTH), np.int64)
    rng = np.random.default_rng(seed)
    for place, value in enumerate(values):
        made[5 + place : 25, 2 + 5 * place : 6 + 5 * place] = value
        made[rng.random(made.shape) < 0.01] = value
    return made


def square(top: int = 5, left: int = 5, side: int = 10) -> np.ndarray:
    made = np.zeros((HEIGHT, WIDTH), bool)
    made[top : top + side, left : left + side] = True
    return made


def pixels(rle: dict) -> np.ndarray:
    return mask_api.decode(rle).astype(bool)


def read(kind: type, root: Path, **options) -> list[Record]:
    source = pickle.loads(pickle.dumps(kind.open(root, options)))
    return [source.read(item) for item in source.items()]


def one_png(root: Path, values: np.ndarray, mode: str = 'L', **options) -> Record:
    image(root / 'images/a.jpg')
    mask(root / 'masks/a.png', values, mode)
    (record,) = read(MaskPngReader, root, **{'classes': ['cell'], **options})
    return record


def one_binary(root: Path, values: np.ndarray, mode: str = 'L', **options) -> Record:
    image(root / 'spot/a.jpg')
    mask(root / 'spot/a.png', values, mode)
    (record,) = read(BinaryMasksReader, root, **options)
    return record


# ---- object numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'mode, values',
    [('L', (1, 2, 3)), ('L', (7, 80, 254)), ('P', (1, 5, 200)), ('16', (1, 300, 65535)), ('1', (1,)), ('L', ())],
)
def test_each_value_is_an_object_with_its_pixels(tmp_path, mode, values):
    made = numbers(*values)
    record = one_png(tmp_path, made, mode)
    assert (record.problems, record.notes) == ([], [])
    assert (record.width, record.height) == (WIDTH, HEIGHT)
    assert [i.place for i in record.instances] == [f'object {value}' for value in values]
    for instance, value in zip(record.instances, values, strict=True):
        assert instance.category == 'cell'
        assert (pixels(instance.segmentation) == (made == value)).all()


def test_colours_are_objects_and_black_is_none(tmp_path):
    made = numbers(1, 2, 3)
    # Two of them differ in blue only.
    colours = np.array([[0, 0, 0], [255, 0, 0], [10, 20, 30], [10, 20, 31]], np.uint8)
    record = one_png(tmp_path, colours[made], 'RGB')
    found = [pixels(i.segmentation) for i in record.instances]
    assert len(found) == 3
    assert sorted(m.sum() for m in found) == sorted((made == k).sum() for k in (1, 2, 3))
    assert all(any((m == (made == k)).all() for m in found) for k in (1, 2, 3))


def test_transparent_pixels_are_background(tmp_path):
    made = numbers(1, 2)
    rgba = np.array([[9, 9, 9, 0], [255, 0, 0, 255], [0, 255, 0, 255]], np.uint8)[made]
    record = one_png(tmp_path, rgba, 'RGBA')
    assert {int(pixels(i.segmentation).sum()) for i in record.instances} == {int((made == k).sum()) for k in (1, 2)}


def test_grey_saved_as_colour_keeps_its_values(tmp_path):
    made = numbers(1, 2, 9)
    record = one_png(tmp_path, np.repeat(made[..., None], 3, axis=2), 'RGB')
    assert [i.place for i in record.instances] == ['object 1', 'object 2', 'object 9']


@pytest.mark.parametrize(
    'mode, void, objects, note',
    [
        ('P', None, [1, 2], None),
        ('P', -1, [1, 2, 255], None),
        ('P', 2, [1, 255], None),
        ('L', None, [1, 2, 255], message('masks-maybe-void', place='masks/a.png', void=255)),
        ('L', 255, [1, 2], None),
        ('RGB', 255, [1, 2], None),
    ],
)
def test_void(tmp_path, mode, void, objects, note):
    made = numbers(1, 2, 255)
    values = np.repeat(made[..., None], 3, axis=2) if mode == 'RGB' else made
    record = one_png(tmp_path, values, mode, **({} if void is None else {'void': void}))
    assert [i.place for i in record.instances] == [f'object {value}' for value in objects]
    assert record.notes == ([] if note is None else [note])
    source = MaskPngReader.open(tmp_path, {'classes': ['cell'], 'void': void})
    assert source.notes == ([] if mode != 'P' or void is not None else [message('masks-void', void=255)])


def test_void_among_colours(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [255, 255, 255]], np.uint8)
    made = numbers(1, 2)
    (instance,) = one_png(tmp_path, colours[made], 'RGB', void=255).instances
    assert (pixels(instance.segmentation) == (made == 1)).all()


def test_a_second_png_tells_the_classes(tmp_path):
    made = numbers(1, 2, 3)
    labels = np.array([0, 2, 1, 2])[made]
    # The edges of class masks are often void or belong to a neighbour.
    labels[5, 2:6] = 255
    labels[24, 7:11] = 2
    mask(tmp_path / 'classes/a.png', labels, 'P')
    (tmp_path / 'classes.txt').write_text('_background_\ncat\ndog\n')
    record = one_png(tmp_path, made, classes=None)
    assert record.problems == []
    assert [i.category for i in record.instances] == ['dog', 'cat', 'dog']
    cat = int((made == 2).sum())
    facts = dict(place='classes/a.png', number=2, label='cat', most=cat - 4, pixels=cat)
    assert record.notes == [message('masks-class-mixed', **facts)]


@pytest.mark.parametrize(
    'change, problem',
    [
        (lambda labels: labels * 0, message('masks-class-number', number=1, label=0, count=1)),
        (lambda labels: labels * 9, message('masks-class-number', number=1, label=9, count=1)),
        (
            lambda labels: labels[:20],
            message('mask-file-size', width=60, height=20, image='images/a.jpg', size='60x40'),
        ),
        (lambda labels: np.stack([labels, labels * 0, labels], axis=2), message('masks-class-colours')),
    ],
    ids=['background', 'no such class', 'size', 'colours'],
)
def test_bad_class_masks(tmp_path, change, problem):
    made = numbers(1)
    labels = change((made > 0).astype(np.int64))
    mask(tmp_path / 'classes/a.png', labels, 'RGB' if labels.ndim == 3 else 'L')
    record = one_png(tmp_path, made, classes=['cat'])
    assert record.problems == [problem.at('classes/a.png')]


def test_missing_class_mask(tmp_path):
    image(tmp_path / 'images/b.jpg')
    mask(tmp_path / 'masks/b.png', numbers(1))
    mask(tmp_path / 'classes/b.png', numbers(1))
    image(tmp_path / 'images/a.jpg')
    mask(tmp_path / 'masks/a.png', numbers(1))
    a, b = read(MaskPngReader, tmp_path, classes=['cat'])
    assert a.problems == [message('masks-no-class-mask', place='images/a.jpg')]
    assert (b.problems, len(b.instances)) == ([], 1)


@pytest.mark.parametrize(
    'image_name, mask_name, split',
    [
        ('images/a.jpg', 'masks/a_mask.png', None),
        ('images/a.JPG', 'masks/a_instances.PNG', None),
        ('images/a.png', 'masks/a-label.tif', None),
        ('imgs/a b 猫.jpg', 'instances/a b 猫.png', None),
        ('train/images/a.jpg', 'train/masks/a.png', 'train'),
        ('images/val/x/a.jpg', 'masks/val/x/a.png', 'val'),
    ],
)
def test_where_images_and_masks_lie(tmp_path, image_name, mask_name, split):
    image(tmp_path / image_name)
    mask(tmp_path / mask_name, numbers(1, 2))
    source = MaskPngReader.open(tmp_path, {'classes': ['cell']})
    (item,) = source.items()
    record = source.read(item)
    assert (source.problems, record.problems, len(record.instances)) == ([], [], 2)
    assert (item.key, item.split) == (image_name, split)
    assert MaskPngReader.detect(tmp_path) == ('images/ and masks/ with a mask of object numbers for 1 of 1 images')


def test_files_that_miss_their_partner(tmp_path):
    image(tmp_path / 'images/a.jpg')
    mask(tmp_path / 'masks/a.png', numbers(1))
    image(tmp_path / 'images/b.jpg')
    mask(tmp_path / 'masks/c.png', numbers(1))
    source = MaskPngReader.open(tmp_path, {'classes': ['cell']})
    assert source.problems == [message('masks-no-image', place='masks/c.png')]
    a, b = (source.read(item) for item in source.items())
    assert (a.problems, b.problems) == ([], [message('masks-no-mask', place='images/b.jpg')])
    source = MaskPngReader.open(tmp_path, {'classes': ['cell'], 'background': True})
    a, b = (source.read(item) for item in source.items())
    assert (b.problems, b.instances, b.width) == ([], [], WIDTH)
    assert source.notes == [message('masks-background', count=1, images=2)]


def test_files_that_have_several_partners(tmp_path):
    image(tmp_path / 'images/a.jpg')
    image(tmp_path / 'images/a.png')
    mask(tmp_path / 'masks/a.png', numbers(1))
    image(tmp_path / 'images/b.jpg')
    mask(tmp_path / 'masks/b.png', numbers(1))
    mask(tmp_path / 'masks/b_mask.png', numbers(1))
    source = MaskPngReader.open(tmp_path, {'classes': ['cell']})
    assert source.problems == [
        message('masks-several-images', place='masks/a.png', images='images/a.jpg, images/a.png')
    ]
    assert source.read(source.items()[2]).problems == [
        message('masks-several', place='images/b.jpg', masks='masks/b.png, masks/b_mask.png')
    ]


def bad_size(path: Path) -> None:
    mask(path, numbers(1)[:, :50])


def empty(path: Path) -> None:
    path.write_bytes(b'')


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def jpeg(path: Path) -> None:
    Image.fromarray(numbers(1, 2).astype(np.uint8)).save(path, 'JPEG')


def text(path: Path) -> None:
    path.write_text('no picture')


def fractions(path: Path) -> None:
    Image.fromarray(numbers(1).astype(np.float32)).save(path, 'TIFF')


@pytest.mark.parametrize(
    'damage, code',
    [
        (bad_size, 'mask-file-size'),
        (empty, 'image-file-empty'),
        (truncated, 'image-file-unreadable'),
        (jpeg, 'masks-inexact'),
        (text, 'image-file-unknown'),
        (fractions, 'masks-fractions'),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_bad_masks(tmp_path, damage, code):
    for name in 'ab':
        image(tmp_path / f'images/{name}.png')
        mask(tmp_path / f'masks/{name}.png', numbers(1, 2))
    damage(tmp_path / 'masks/a.png')
    a, b = read(MaskPngReader, tmp_path, classes=['cell'])
    assert [(m.code, m.facts['place']) for m in a.problems] == [(code, 'masks/a.png')]
    assert (b.problems, len(b.instances)) == ([], 2)


def test_a_photograph_is_no_mask(tmp_path):
    image(tmp_path / 'images/a.png', (200, 200))
    mask(tmp_path / 'masks/a.png', np.random.default_rng(0).integers(0, 65536, (200, 200)), '16')
    (record,) = read(MaskPngReader, tmp_path, classes=['cell'])
    assert codes(record.problems) == ['masks-values']


def test_damaged_and_turned_images(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    for name in 'abc':
        image(tmp_path / f'images/{name}.jpg', (HEIGHT, WIDTH), exif=exif)
        mask(tmp_path / f'masks/{name}.png', numbers(1))
    mask(tmp_path / 'masks/b.png', numbers(1).T)
    (tmp_path / 'images/c.jpg').write_bytes(b'')
    a, b, c = read(MaskPngReader, tmp_path, classes=['cell'])
    assert (a.problems, a.width, len(a.instances)) == ([], WIDTH, 1)
    facts = dict(place='masks/b.png', width=40, height=60, image='images/b.jpg', size='60x40')
    assert b.problems == [message('mask-file-turned', **facts)]
    assert c.problems == [message('image-file-empty', place='images/c.jpg')]


def test_classes_of_object_numbers_must_be_known(tmp_path):
    image(tmp_path / 'images/a.jpg')
    mask(tmp_path / 'masks/a.png', numbers(1))
    with refused('masks-no-classes') as caught:
        MaskPngReader.open(tmp_path, {})
    assert '--classes NAME' in caught.value.hint
    (tmp_path / 'classes.txt').write_text('cat\ndog\n')
    with refused('masks-classes', names='cat, dog'):
        MaskPngReader.open(tmp_path, {})
    assert MaskPngReader.open(tmp_path, {'classes': ['dog']}).classes == ['dog']
    (tmp_path / 'classes.txt').write_text('cat\n')
    assert MaskPngReader.open(tmp_path, {}).classes == ['cat']


@pytest.mark.parametrize('reader, code', [(MaskPngReader, 'masks-none'), (BinaryMasksReader, 'masks-binary-none')])
def test_folders_without_masks(tmp_path, reader, code):
    image(tmp_path / 'images/a.jpg')
    assert reader.detect(tmp_path) is None
    assert reader.detect(tmp_path / 'nothing') is None
    with refused(code, path=tmp_path, images=1):
        reader.open(tmp_path, {'classes': ['x']})


# ---- black and white ----------------------------------------------------------------------------


def test_objects_are_connected_parts(tmp_path):
    made = square(2, 2) | square(12, 12) | square(25, 40, 4)
    record = one_binary(tmp_path, made * 255)
    assert (record.problems, record.notes) == ([], [])
    # The first two touch at a corner only.
    assert [i.category for i in record.instances] == ['spot', 'spot']
    wanted = [square(2, 2) | square(12, 12), square(25, 40, 4)]
    for instance, part in zip(record.instances, wanted, strict=True):
        assert (pixels(instance.segmentation) == part).all()


def test_no_pixel_is_lost_or_gained(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH))
    grey[5:20, 5:20] = 255
    record = one_binary(tmp_path, grey, min_area=1)
    together = sum(pixels(i.segmentation).astype(int) for i in record.instances)
    assert (together == (grey >= THRESHOLD)).all()
    assert one_binary(tmp_path, grey, min_area=1, threshold=200).instances[0] != record.instances[0]


def test_specks_are_left_out_and_told(tmp_path):
    made = square() | square(20, 30, 3) | square(20, 40, 1) | square(30, 40, 2)
    record = one_binary(tmp_path, made * 255)
    assert MIN_AREA == 10
    assert len(record.instances) == 1
    facts = dict(place='spot/a.png', left_out=3, count=4, least=10, largest=9)
    assert record.notes == [message('masks-small', **facts)]
    assert len(one_binary(tmp_path, made * 255, min_area=0).instances) == 4
    assert len(one_binary(tmp_path, made * 255, min_area=9).instances) == 2


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', '16'])
def test_modes_of_black_and_white(tmp_path, mode):
    made = square()
    image(tmp_path / 'spot/a.jpg')
    path = tmp_path / 'spot/a.png'
    if mode == 'P':
        # As VOC's palette: dark colours whose index is far below the threshold.
        picture = Image.fromarray(made.astype(np.uint8))
        picture.putpalette([0, 0, 0, 128, 0, 0])
    elif mode in ('RGB', 'RGBA'):
        colours = np.array([[0, 0, 0, 255], [0, 0, 255, 255]], np.uint8)[made.astype(int)]
        picture = Image.fromarray(np.ascontiguousarray(colours[..., : len(mode)]))
    elif mode == '16':
        picture = Image.fromarray((made * 65535).astype(np.uint16))
    else:
        picture = Image.fromarray(made).convert(mode)
    picture.save(path)
    (record,) = read(BinaryMasksReader, tmp_path)
    assert record.problems == []
    assert (pixels(record.instances[0].segmentation) == made).all()


def test_smoothed_and_lossy_masks_may_be_black_and_white(tmp_path):
    image(tmp_path / 'images/a.jpg')
    (tmp_path / 'masks/spot').mkdir(parents=True)
    Image.fromarray((square() * 255).astype(np.uint8)).save(tmp_path / 'masks/spot/a.jpg')
    (record,) = read(BinaryMasksReader, tmp_path)
    assert record.problems == []
    (part,) = (pixels(i.segmentation) for i in record.instances)
    assert (part & square()).sum() / (part | square()).sum() > 0.9


def test_empty_masks_make_images_without_objects(tmp_path):
    record = one_binary(tmp_path, square() * 0)
    assert (record.problems, record.notes, record.instances) == ([], [], [])


def test_values_below_the_threshold_are_told(tmp_path):
    record = one_binary(tmp_path, square() * 1)
    assert record.problems == [message('masks-dark', place='spot/a.png', peak=1, threshold=128)]
    assert len(one_binary(tmp_path, square() * 1, threshold=1).instances) == 1


@pytest.mark.parametrize(
    'pairs, classes',
    [
        ({'crack/a.jpg': ['crack/a.png'], 'hole/Imgs/a.jpg': ['hole/Imgs/a.png']}, ['crack', 'hole']),
        ({'train/crack/a.jpg': ['train/crack/a.png'], 'val/crack/b.jpg': ['val/crack/b.png']}, ['crack']),
        ({'crack/a_1.jpg': ['crack/a_1_mask.png'], 'crack/a_1_2.jpg': ['crack/a_1_2_mask.png']}, ['crack']),
        (
            {'images/a.jpg': ['masks/crack/a.png', 'masks/hole/a.png'], 'images/b.jpg': ['masks/hole/b.png']},
            ['crack', 'hole'],
        ),
        ({'images/train/a.jpg': ['masks/crack/train/a.png', 'masks/train/hole/a.png']}, ['crack', 'hole']),
        ({'train/images/a.jpg': ['train/masks/crack/a_mask.png']}, ['crack']),
        ({'crack/images/a.jpg': ['crack/masks/a.png'], 'hole/images/a.jpg': ['hole/masks/a.png']}, ['crack', 'hole']),
        ({'images/a.jpg': ['masks/a_crack.png', 'masks/a_hole_mask.png']}, ['crack', 'hole']),
        ({'a.jpg': ['a_crack.png', 'a_mask_hole.png'], 'a_b.jpg': ['a_b_crack.png']}, ['crack', 'hole']),
        ({'a.png': ['a_crack.png', 'a_hole.png']}, ['crack', 'hole']),
        ({'x/photo 猫.jpg': ['x/photo 猫_Riß 1.png']}, ['Riß 1']),
        ({'a.jpg': ['masks/crack/a.png']}, ['crack']),
    ],
)
def test_layouts(tmp_path, pairs, classes):
    for name, masks in pairs.items():
        image(tmp_path / name)
        for path in masks:
            mask(tmp_path / path, square() * 255)
    source = BinaryMasksReader.open(tmp_path, {})
    assert (source.classes, source.problems) == (classes, [])
    items = source.items()
    assert {item.key: sorted(path.relative_to(tmp_path).as_posix() for _, path in item.label[0]) for item in items} == {
        name: sorted(masks) for name, masks in pairs.items()
    }
    records = [source.read(item) for item in items]
    assert [record.problems for record in records] == [[] for _ in records]
    found = [i.category for record in records for i in record.instances]
    assert len(found) == sum(map(len, pairs.values()))
    assert sorted(set(found)) == classes
    for item in items:
        assert item.split == next((s for s in ('train', 'val') if s in Path(item.key).parts), None)
    assert BinaryMasksReader.detect(tmp_path).startswith('black-and-white masks for ')


def test_one_class_is_named_by_the_user(tmp_path):
    image(tmp_path / 'images/a.jpg')
    mask(tmp_path / 'masks/a.png', square() * 255)
    with refused('masks-unnamed') as caught:
        BinaryMasksReader.open(tmp_path, {})
    assert caught.value.problems == ['masks/a.png']
    (record,) = read(BinaryMasksReader, tmp_path, classes=['rust'])
    assert [i.category for i in record.instances] == ['rust']
    (tmp_path / 'classes.txt').write_text('dent\n')
    (record,) = read(BinaryMasksReader, tmp_path)
    assert [i.category for i in record.instances] == ['dent']
    with refused('masks-unnamed'):
        BinaryMasksReader.open(tmp_path, {'classes': ['rust', 'dent']})


def test_a_class_list_gives_the_order(tmp_path):
    for name in ('crack', 'hole'):
        image(tmp_path / name / 'a.jpg')
        mask(tmp_path / name / 'a.png', square() * 255)
    (tmp_path / 'classes.txt').write_text('hole\nscratch\ncrack\n')
    assert BinaryMasksReader.open(tmp_path, {}).classes == ['hole', 'scratch', 'crack']
    (tmp_path / 'classes.txt').write_text('hole\n')
    with refused('masks-unlisted', path=tmp_path / 'classes.txt') as caught:
        BinaryMasksReader.open(tmp_path, {})
    assert caught.value.problems == ['crack']


def test_bad_black_and_white_masks(tmp_path):
    for name in 'abcdef':
        image(tmp_path / f'spot/{name}.jpg')
        mask(tmp_path / f'spot/{name}.png', square() * 255)
    bad_size(tmp_path / 'spot/a.png')
    empty(tmp_path / 'spot/b.png')
    text(tmp_path / 'spot/c.png')
    (tmp_path / 'spot/d.png').unlink()
    (tmp_path / 'spot/e.jpg').rename(tmp_path / 'spot/e.jpg.txt')
    mask(tmp_path / 'spot/f_mask.png', square() * 255)
    source = BinaryMasksReader.open(tmp_path, {})
    assert source.problems == [message('masks-no-image', place='spot/e.png')]
    problems = [line for item in source.items() for line in source.read(item).problems]
    assert [(m.code, m.facts['place']) for m in problems] == [
        ('mask-file-size', 'spot/a.png'),
        ('image-file-empty', 'spot/b.png'),
        ('image-file-unknown', 'spot/c.png'),
        ('masks-no-mask', 'spot/d.jpg'),
        ('masks-several-of-class', 'spot/f.jpg'),
    ]
    assert problems[4].facts['masks'] == 'spot/f.png, spot/f_mask.png'


def test_a_split_is_no_class(tmp_path):
    image(tmp_path / 'images/a.jpg')
    mask(tmp_path / 'masks/crack/a.png', square() * 255)
    mask(tmp_path / 'masks/train/a.png', square() * 255)
    source = BinaryMasksReader.open(tmp_path, {})
    assert source.classes == ['crack']
    assert source.problems == [message('masks-no-image', place='masks/train/a.png')]


@pytest.mark.parametrize('folder', ['masks', 'masks/crack'])
def test_folders_that_hardly_match_are_not_claimed(tmp_path, folder):
    for name in 'abcd':
        mask(tmp_path / folder / f'{name}.png', square() * 255)
        mask(tmp_path / 'masks' / f'{name}.png', numbers(1, 2))
    image(tmp_path / 'images/a.jpg')
    assert MaskPngReader.detect(tmp_path) is None
    assert BinaryMasksReader.detect(tmp_path) is None


@pytest.mark.parametrize(
    'values, kinds',
    [
        (square() * 255, {BinaryMasksReader}),
        (numbers(1, 2), {MaskPngReader}),
        # One object an image, or black and white with 0 and 1: only the user knows.
        (square() * 1, {MaskPngReader, BinaryMasksReader}),
        (square() * 0, {BinaryMasksReader}),
    ],
)
def test_both_kinds_in_one_layout_are_told_apart_by_their_values(tmp_path, values, kinds):
    for name in 'abc':
        image(tmp_path / f'images/{name}.jpg')
        mask(tmp_path / f'masks/{name}.png', values)
    assert {kind for kind in (MaskPngReader, BinaryMasksReader) if kind.detect(tmp_path)} == kinds


@pytest.mark.parametrize(
    'names',
    [
        ['JPEGImages/a.jpg', 'SegmentationObject/a.png', 'SegmentationClass/a.png'],
        ['train2017/a.jpg', 'annotations/panoptic/b.png'],
        [
            'leftImg8bit/train/c/x_leftImg8bit.png',
            'gtFine/train/c/x_gtFine_instanceIds.png',
            'gtFine/train/c/x_gtFine_labelIds.png',
            'gtFine/train/c/x_gtFine_color.png',
        ],
        ['dataset/img/a.jpg', 'dataset/cls/a.png'],
        ['images/a.jpg', 'labels/a.png'],
    ],
    ids=['VOC', 'COCO', 'Cityscapes', 'SBD', 'labels'],
)
def test_other_kinds_are_not_claimed(tmp_path, names):
    for name in names:
        mask(tmp_path / name, square() * 255)
    assert MaskPngReader.detect(tmp_path) is None
    assert BinaryMasksReader.detect(tmp_path) is None


@pytest.mark.parametrize('workers', [1, 2])
def test_prepared_json_has_the_masks_pixels(tmp_path, workers):
    made = {name: numbers(1, 4, 200, seed=seed) for seed, name in enumerate('abcdefgh')}
    for name, values in made.items():
        image(tmp_path / f'src/images/{name}.jpg')
        mask(tmp_path / f'src/masks/{name}.png', values)
    prepare(tmp_path / 'src', tmp_path / 'out', 'mask-png', workers=workers, progress=False, classes=['cell'])
    data = json.loads((tmp_path / 'out/annotations/instances_all.json').read_text())
    assert [i['file_name'] for i in data['images']] == [f'{name}.jpg' for name in made]
    names = {i['id']: i['file_name'][0] for i in data['images']}
    found = {name: np.zeros((HEIGHT, WIDTH), int) for name in made}
    for annotation in data['annotations']:
        part = pixels(annotation['segmentation'])
        assert annotation['area'] == part.sum()
        value = np.unique(made[names[annotation['image_id']]][part])
        assert len(value) == 1
        found[names[annotation['image_id']]][part] = value[0]
    assert all((found[name] == values).all() for name, values in made.items())


def test_real_masks(real_data):
    folder = real_data / 'magnetic_tile_real'
    assert 'MT_Blowhole, MT_Break, ' in BinaryMasksReader.detect(folder)
    source = BinaryMasksReader.open(folder, {})
    assert source.classes == ['MT_Blowhole', 'MT_Break', 'MT_Crack', 'MT_Fray', 'MT_Uneven']
    dropped = count = 0
    for item in source.items():
        record = source.read(item)
        assert record.problems == []
        ((label, path),) = item.label[0]
        assert {i.category for i in record.instances} == {label} == {path.parts[-3]}
        wanted = np.asarray(Image.open(path)) >= THRESHOLD
        found = np.zeros(wanted.shape, bool)
        for instance in record.instances:
            part = pixels(instance.segmentation)
            assert not (part & found).any()
            assert ndimage.label(part, np.ones((3, 3)))[1] == 1
            found |= part
        assert not (found & ~wanted).any()
        dropped += int((wanted & ~found).sum())
        count += len(record.instances)
    # Five specks, of 1, 1, 1, 1 and 2 pixels.
    assert (count, dropped) == (96, 6)
