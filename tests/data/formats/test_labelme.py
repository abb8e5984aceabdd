from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.formats.labelme import LabelmeReader
from mmfinetune.data.prepare import prepare
from mmfinetune.data.records import Record
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import codes, message, refused

WIDTH, HEIGHT = 60, 40
SQUARE = [[10, 5], [30, 5], [30, 25], [10, 25]]


def shape(label: str = 'cat', points=None, kind: str | None = 'polygon', **more) -> dict:
    made = {'label': label, 'points': SQUARE if points is None else points, 'group_id': None, 'flags': {}, **more}
    return made if kind is None else {**made, 'shape_type': kind}


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, 'grey').save(path, **save)
    return path


def write(path: Path, *shapes: dict, image_path: str | None = None, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                'version': '5.4.1',
                'flags': {},
                'shapes': list(shapes),
                'imageData': None,
                'imagePath': image_path or f'{path.stem}.jpg',
                'imageHeight': HEIGHT,
                'imageWidth': WIDTH,
                **more,
            },
            ensure_ascii=False,
        ),
        encoding='utf-8',
    )
    return path


def read(root: Path, **options) -> list[Record]:
    source = pickle.loads(pickle.dumps(LabelmeReader.open(root, options)))
    return [source.read(item) for item in source.items()]


def one(root: Path, *shapes: dict, **more) -> Record:
    image(root / 'a.jpg')
    write(root / 'a.json', *shapes, **more)
    (record,) = read(root)
    return record


def pixels(segmentation: list | dict) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = mask_api.merge(mask_api.frPyObjects(segmentation, HEIGHT, WIDTH))
    return mask_api.decode(segmentation).astype(bool)


def png(mask: np.ndarray) -> str:
    with io.BytesIO() as file:
        Image.fromarray(mask.astype(np.uint8)).save(file, 'PNG')
        return base64.b64encode(file.getvalue()).decode()


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.mark.parametrize(
    'made',
    [
        shape(),
        shape(kind=None),
        shape(points=[[30, 25], [10, 5]], kind='rectangle'),
        shape(points=[[10, 25], [30, 5]], kind='rectangle'),
        shape(kind='rectangle'),
        shape(kind='oriented_rectangle'),
        shape(kind='rotation', direction=0.0),
        shape(points=[[10, 5], [29, 24]], kind='mask', mask=png(np.ones((20, 20)))),
    ],
    ids=['polygon', 'old file', 'two corners', 'other corners', 'four corners', 'turned', 'X-AnyLabeling', 'mask'],
)
def test_shapes_cover_their_pixels(tmp_path, made):
    record = one(tmp_path, made)
    assert (record.problems, record.notes) == ([], [])
    assert (record.width, record.height) == (WIDTH, HEIGHT)
    (instance,) = record.instances
    assert instance.category == 'cat'
    assert (pixels(instance.segmentation) == rectangle(10, 5, 30, 25)).all()


def test_polygons_stay_as_they_are(tmp_path):
    points = [[1.25, 2.5], [40.125, 3], [20, 30.75]]
    (instance,) = one(tmp_path, shape(points=points)).instances
    assert instance.segmentation == [[1.25, 2.5, 40.125, 3, 20, 30.75]]


@pytest.mark.parametrize('radius', [0.8, 2, 5.3, 14])
def test_circle_holds_the_pixels_whose_centre_it_holds(tmp_path, radius):
    x, y = 22.3, 18.6
    (instance,) = one(tmp_path, shape(points=[[x, y], [x, y - radius]], kind='circle')).instances
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    wanted = np.hypot(rows - y, columns - x) <= radius
    assert wanted.any()
    assert (pixels(instance.segmentation) == wanted).all()


def test_circle_over_the_edge_is_cut(tmp_path):
    (instance,) = one(tmp_path, shape(points=[[0, 0], [9, 0]], kind='circle')).instances
    mask = pixels(instance.segmentation)
    assert mask[0, 0] and not mask[9, 9]
    assert mask.sum() == pytest.approx(np.pi * 81 / 4, rel=0.03)


@pytest.mark.parametrize(
    'corners, size',
    [
        ([[3, 4], [12, 10]], (7, 10)),
        ([[3.4, 3.6], [12.4, 9.9]], (7, 10)),
        ([[3, 4], [12, 10]], (9, 14)),
        ([[-3, 4], [6, 10]], (7, 10)),
        ([[55, 36], [64, 42]], (7, 10)),
    ],
    ids=['whole corners', 'fractions', 'cut to whole corners', 'over the left edge', 'over the lower right edge'],
)
def test_mask_lies_where_its_points_say(tmp_path, corners, size):
    patch = np.random.default_rng(0).random(size) < 0.5
    (instance,) = one(tmp_path, shape(points=corners, kind='mask', mask=png(patch * 255))).instances
    left, top = (round(value) for value in corners[0])
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    for y, x in np.argwhere(patch[:7, :10]):
        if 0 <= top + y < HEIGHT and 0 <= left + x < WIDTH:
            wanted[top + y, left + x] = True
    assert (pixels(instance.segmentation) == wanted).all()


def test_group_id_joins_shapes_of_one_label(tmp_path):
    record = one(
        tmp_path,
        shape(group_id=1),
        shape(points=[[40, 5], [50, 5], [50, 9]], group_id=1),
        shape('dog', group_id=1),
        shape(),
        shape(group_id=0),
        shape('dog', [[30, 20], [35, 20]], 'circle', group_id=1),
    )
    told = [(i.category, i.place, type(i.segmentation), len(i.segmentation)) for i in record.instances]
    # Polygons alone stay polygons, with another kind they become pixels.
    assert told == [
        ('cat', 'shape 1, 2', list, 2),
        ('dog', 'shape 3, 6', dict, 2),
        ('cat', 'shape 4', list, 1),
        ('cat', 'shape 5', list, 1),
    ]
    both = pixels(record.instances[1].segmentation)
    assert both[rectangle(10, 5, 30, 25)].all() and both.sum() > 400


def test_what_has_no_area_or_class_is_left_out(tmp_path):
    record = one(
        tmp_path,
        shape(points=[[1, 1]], kind='point'),
        shape(points=[[1, 1], [5, 5]], kind='line'),
        shape(points=[[1, 1], [5, 5], [7, 1]], kind='linestrip'),
        shape('__ignore__'),
        shape('_background_'),
        shape(),
    )
    assert [i.place for i in record.instances] == ['shape 6']
    assert record.problems == []
    assert record.notes == [
        message('labelme-no-area', place=f"a.json: shape {number} ('cat')", kind=kind)
        for number, kind in enumerate(('point', 'line', 'linestrip'), start=1)
    ]


CAT = "shape 1 ('cat')"


@pytest.mark.parametrize(
    'shapes, problem',
    [
        ([shape(points=SQUARE[:2])], message('labelme-point-count', place=CAT, kind='polygon', count=2)),
        ([shape(), shape(points=[])], message('labelme-point-count', place="shape 2 ('cat')", kind='polygon', count=0)),
        (
            [shape(points=SQUARE[:3], kind='rectangle')],
            message('labelme-point-count', place=CAT, kind='rectangle', count=3),
        ),
        ([shape(points=SQUARE[:1], kind='circle')], message('labelme-point-count', place=CAT, kind='circle', count=1)),
        ([shape(points=[[1, 2], [float('nan'), 3], [4, 5]])], message('shape-polygon-nan', place=CAT)),
        ([shape(points=[[1, 2], ['3', 3], [4, 5]])], message('shape-polygon-number', place=CAT, value="'3'")),
        ([shape(points=[[1, 2], [3], [4, 5]])], message('labelme-points', place=CAT)),
        ([shape(points='1 2 3')], message('labelme-points', place=CAT)),
        (
            [shape(points=[[1, 2], [1e9, 3], [4, 5]])],
            message('shape-polygon-far', place=CAT, value='1000000000.0', width=60, height=40),
        ),
        ([shape(kind='ellipse')], message('labelme-shape-unknown', place=CAT, kind='ellipse')),
        ([shape(kind=['polygon'])], message('labelme-shape-unknown', place=CAT, kind="['polygon']")),
        ([shape(label='')], message('labelme-no-label', place='shape 1')),
        ([shape(label=3)], message('labelme-no-label', place='shape 1')),
        ([[1, 2]], message('labelme-shape-type', place='shape 1')),
        ([shape(group_id=[1])], message('labelme-group', place=CAT)),
        ([shape(points=[[1, 2], [5, 6]], kind='mask')], message('labelme-mask-missing', place=CAT)),
        (
            [shape(points=[[1, 2], [9, 9]], kind='mask', mask=png(np.ones((5, 5))))],
            message('labelme-mask-size', place=CAT, width=5, height=5, columns=9, rows=8),
        ),
    ],
)
def test_bad_shapes_are_told_with_their_place(tmp_path, shapes, problem):
    write(tmp_path / 'b.json', shape())
    image(tmp_path / 'b.jpg')
    image(tmp_path / 'a.jpg')
    write(tmp_path / 'a.json', *shapes)
    bad, good = read(tmp_path)
    assert bad.problems == [problem.at('a.json')]
    assert (good.problems, len(good.instances)) == ([], 1)


@pytest.mark.parametrize(
    'mask, code', [('%', 'labelme-mask-png'), ('abcd', 'labelme-mask-png'), ('a', 'labelme-mask-base64')]
)
def test_damaged_masks_are_told(tmp_path, mask, code):
    record = one(tmp_path, shape(points=[[1, 2], [5, 6]], kind='mask', mask=mask))
    assert codes(record.problems) == [code]
    assert record.problems[0].facts['place'] == f'a.json: {CAT}'


@pytest.mark.parametrize(
    'content, code',
    [
        (b'', 'json-empty'),
        (b'{"shapes": [{"label": "cat", "poi', 'json-syntax'),
        (b'not JSON', 'json-syntax'),
        (b'{"shapes": {}}', 'labelme-shapes'),
        ('{"shapes": ["ünïcode"]}'.encode('latin-1'), 'text-file-encoding'),
        (b'[' * 100_000, 'json-nesting'),
    ],
    ids=['empty', 'truncated', 'text', 'shapes no list', 'Latin-1', 'deep'],
)
def test_bad_files(tmp_path, content, code):
    write(tmp_path / 'b.json', shape())
    for name in 'ab':
        image(tmp_path / f'{name}.jpg')
    (tmp_path / 'a.json').write_bytes(content)
    bad, good = read(tmp_path)
    assert [(m.code, m.facts['place']) for m in bad.problems] == [(code, 'a.json')]
    assert good.problems == []


def test_byte_order_mark_and_names_in_any_script(tmp_path):
    image(tmp_path / 'ein Bild 猫.jpg')
    path = write(tmp_path / 'ein Bild 猫.json', shape(' Katze 猫 '))
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    source = LabelmeReader.open(tmp_path, {})
    assert source.classes == ['Katze 猫']
    record = source.read(source.items()[0])
    assert [i.category for i in record.instances] == ['Katze 猫']


@pytest.mark.parametrize(
    'json_name, image_name, said',
    [
        ('a.json', 'a.jpg', 'a.jpg'),
        ('a.json', 'photo.png', 'photo.png'),
        ('a.json', 'a.png', 'renamed.jpg'),
        ('a.json', 'a.png', 'x' * 5000),
        ('a.json', 'a.JPG', '/home/her/a.jpg'),
        ('a.json', 'sub/a.jpg', 'sub\\a.jpg'),
        ('labels/a.json', 'images/a.jpg', '..\\images\\a.jpg'),
        ('labels/a.json', 'images/a.jpg', 'C:\\photos\\a.jpg'),
        ('train/labels/x/a.json', 'train/images/x/a.bmp', 'gone.jpg'),
        ('annotations/a.json', 'elsewhere/a.jpg', 'gone.jpg'),
        ('a.v2.json', 'a.v2.jpg', 'gone.jpg'),
    ],
)
def test_image_is_found(tmp_path, json_name, image_name, said):
    wanted = image(tmp_path / image_name)
    write(tmp_path / json_name, shape(), image_path=said)
    (record,) = read(tmp_path)
    assert record.problems == []
    assert record.image.resolve() == wanted.resolve()
    assert len(record.instances) == 1


def test_a_name_that_several_images_have_is_not_matched(tmp_path):
    image(tmp_path / 'src/0.jpg')
    image(tmp_path / 'src/1.jpg')
    for name, path in (('a', 'cam1/0.jpg'), ('b', 'cam2/0.jpg'), ('c', '/old/1.jpg')):
        write(tmp_path / f'src/{name}.json', shape(), image_path=path)
    a, b, c = read(tmp_path / 'src')
    assert (codes(a.problems), codes(b.problems), c.problems) == (*[['labelme-image-ambiguous']] * 2, [])
    summary = prepare(tmp_path / 'src', tmp_path / 'out', skip_bad=True, workers=1, progress=False)
    assert summary.splits['all'].images == 1
    # The one that names the file as it is has it.
    write(tmp_path / 'src/a.json', shape(), image_path='0.jpg')
    assert [codes(record.problems) for record in read(tmp_path / 'src')] == [[], ['labelme-image-ambiguous'], []]


def test_no_image_outside_the_data_set_is_taken(tmp_path):
    outside, root = image(tmp_path / 'b.jpg'), tmp_path / 'set'
    image(root / 'a.jpg')
    write(root / 'a.json', shape())
    for name in ('../b.jpg', '..\\b.jpg', str(outside), '../set/../b.jpg'):
        write(root / 'c.json', shape(), image_path=name)
        _, record = read(root)
        assert record.problems == [message('labelme-image-outside', place='c.json', image=name)]
        _, record = read(root, image_root=tmp_path)
        assert (record.problems, record.image) == ([], outside)
    write(root / 'c.json', shape(), image_path='/dev/zero')
    assert codes(read(root)[1].problems) == ['labelme-image-outside']
    # The last folder of a name that was written elsewhere may be a convention, and the file next to this one.
    write(root / 'labels/d.json', shape(), image_path='../images/b.jpg')
    image(root / 'images/b.jpg')
    assert read(root / 'labels')[0].problems == []


@pytest.mark.parametrize('kind', STRANGE)
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    image(tmp_path / 'a.jpg')
    write(tmp_path / 'a.json', shape())
    strange(tmp_path / 'b.json', kind)
    assert LabelmeReader.detect(tmp_path) is None or kind == 'folder'
    problems = [problem for record in read(tmp_path) for problem in record.problems]
    assert codes(problems) == ([] if kind == 'folder' else ['text-file-unreadable'])


def test_a_path_written_on_windows_tells_which_of_two(tmp_path):
    image(tmp_path / 'one/a.jpg')
    wanted = image(tmp_path / 'two/a.jpg')
    write(tmp_path / 'a.json', shape(), image_path='two\\a.jpg')
    (record,) = read(tmp_path)
    assert (record.problems, record.image) == ([], wanted)


def test_missing_image_is_told_and_whether_it_is_embedded(tmp_path):
    write(tmp_path / 'a.json', shape(), image_path='/far/away/x.jpg')
    write(tmp_path / 'b.json', shape(), imageData='AAAA')
    # Two images of that name: nobody knows which.
    write(tmp_path / 'c.json', shape(), image_path='gone.jpg')
    image(tmp_path / 'one/c.jpg')
    image(tmp_path / 'two/c.jpg')
    source = LabelmeReader.open(tmp_path, {})
    assert [source.read(item).problems for item in source.items()] == [
        [message('labelme-image-missing', place='a.json', image='/far/away/x.jpg')],
        [message('labelme-image-embedded', place='b.json', image='b.jpg')],
        [message('labelme-image-missing', place='c.json', image='gone.jpg')],
    ]
    assert 'labelme_export_json' in source.hint
    # The folder that all names are relative to does not move because of a missing one.
    assert all(item.image.is_relative_to(tmp_path) for item in source.items())


def test_damaged_and_misnamed_images(tmp_path):
    for name in 'abcd':
        write(tmp_path / f'{name}.json', shape())
        image(tmp_path / f'{name}.jpg')
    (tmp_path / 'a.jpg').write_bytes(b'')
    (tmp_path / 'b.jpg').write_bytes((tmp_path / 'b.jpg').read_bytes()[:-50])
    image(tmp_path / 'c.png').rename(tmp_path / 'c.jpg')
    (tmp_path / 'd.jpg').write_text('text')
    a, b, c, d = read(tmp_path)
    assert a.problems == [message('image-file-empty', place='a.jpg')]
    assert b.problems == [message('image-file-truncated', place='b.jpg', format='JPEG')]
    assert (c.problems, len(c.instances)) == ([], 1)
    assert d.problems == [message('image-file-unknown', place='d.jpg')]


def test_size_must_be_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    image(tmp_path / 'a.jpg', (HEIGHT, WIDTH), exif=exif)
    write(tmp_path / 'a.json', shape())
    image(tmp_path / 'b.jpg', (WIDTH, HEIGHT), exif=exif)
    write(tmp_path / 'b.json', shape())
    image(tmp_path / 'c.jpg', (WIDTH * 2, HEIGHT * 2))
    write(tmp_path / 'c.json', shape())
    image(tmp_path / 'd.jpg')
    write(tmp_path / 'd.json', shape(), imageHeight=None, imageWidth=None)
    a, b, c, d = read(tmp_path)
    assert (a.problems, a.width, a.height) == ([], WIDTH, HEIGHT)
    facts = dict(place='b.json', image='b.jpg', said='60x40', size='40x60')
    assert b.problems == [message('labelme-size-turned', **facts)]
    assert c.problems == [message('labelme-size', place='c.json', image='c.jpg', said='60x40', size='120x80')]
    assert d.problems == []


def test_classes_come_from_a_list_or_the_files(tmp_path):
    for name, labels in (('a', ('dog', 'cat')), ('b', ('ant', '__ignore__'))):
        image(tmp_path / f'{name}.jpg')
        write(tmp_path / f'{name}.json', *map(shape, labels), shape('only a point', [[1, 1]], 'point'))
    assert LabelmeReader.open(tmp_path, {}).classes == ['ant', 'cat', 'dog']
    (tmp_path / 'labels.txt').write_text('__ignore__\n_background_\ndog\ncat\n')
    assert LabelmeReader.open(tmp_path, {}).classes == ['dog', 'cat']
    a, b = read(tmp_path)
    assert a.problems == []
    place = "b.json: shape 1 ('ant')"
    assert b.problems == [message('labelme-label-unknown', place=place, file='labels.txt')]
    (tmp_path / 'labels.txt').write_text('dog\n\ncat\ndog\n')
    with refused('class-list', path=tmp_path / 'labels.txt') as caught:
        LabelmeReader.open(tmp_path, {})
    assert caught.value.problems == [
        message('class-list-line-empty', line=2),
        message('class-list-repeated', name='dog', count=2),
    ]


def test_folders_of_splits(tmp_path):
    for folder in ('train', 'valid', 'rest'):
        image(tmp_path / folder / 'a.jpg')
        write(tmp_path / folder / 'a.json', shape())
    source = LabelmeReader.open(tmp_path, {})
    assert [(item.key, item.split) for item in source.items()] == [
        ('rest/a.json', None),
        ('train/a.json', 'train'),
        ('valid/a.json', 'val'),
    ]


def test_other_json_files_are_noted(tmp_path):
    one(tmp_path, shape())
    (tmp_path / 'settings.json').write_text('{"colour": "red"}')
    source = LabelmeReader.open(tmp_path, {})
    assert source.notes == [message('labelme-other-file', place='settings.json')]
    assert [item.key for item in source.items()] == ['a.json']


@pytest.mark.parametrize(
    'files, code, count',
    [
        ({}, 'labelme-no-files', 0),
        ({'x.json': {'images': []}}, 'labelme-no-files', 1),
        ({'x.json': {'shapes': []}}, 'labelme-no-shapes', 1),
    ],
)
def test_folders_without_objects(tmp_path, files, code, count):
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    with refused(code, path=tmp_path, count=count):
        LabelmeReader.open(tmp_path, {})


def test_damaged_files_alone(tmp_path):
    (tmp_path / 'a.json').write_text('{"shapes": [')
    with refused('labelme-no-shapes') as caught:
        LabelmeReader.open(tmp_path, {})
    facts = dict(reason='Expecting value', line=1, column=13)
    assert caught.value.problems == [message('json-syntax', place='a.json', **facts)]


def test_images_without_a_file_are_not_done_yet(tmp_path):
    image(tmp_path / 'b.jpg')
    image(tmp_path / 'c.png')
    one(tmp_path, shape())
    (tmp_path / 'x').mkdir()
    source = LabelmeReader.open(tmp_path / 'x' / '..', {})
    assert [item.key for item in source.items()] == ['a.json']
    assert source.notes == [message('labelme-unlabelled', count=2, images=3)]


def test_detect(tmp_path):
    assert LabelmeReader.detect(tmp_path / 'nothing') is None
    coco = tmp_path / 'coco'
    coco.mkdir()
    (coco / 'instances.json').write_text('{"images": [], "annotations": [], "categories": []}')
    (coco / 'broken.json').write_text('{"shapes')
    assert LabelmeReader.detect(coco) is None
    one(tmp_path / 'ours', shape())
    assert LabelmeReader.detect(tmp_path / 'ours') == ("1 *.json, with 'shapes' as LabelMe writes them (a.json)")


def test_prepared_json_has_the_polygons_pixels(tmp_path):
    image(tmp_path / 'src' / 'a.jpg')
    parts = [[[5.5, 5], [20, 7.25], [8, 30]], [[40, 5], [50, 5], [50, 9]]]
    write(
        tmp_path / 'src' / 'a.json',
        *(shape(points=part, group_id=1) for part in parts),
        shape('dog', [[20, 20], [26, 20]], 'circle'),
        shape('dog', [[1, 1], [1.2, 1]], 'circle'),
    )
    summary = prepare(tmp_path / 'src', tmp_path / 'out', 'labelme', workers=1, progress=False)
    assert summary.splits['all'].per_class == {'cat': 1, 'dog': 1}
    assert summary.dropped == {'without a pixel in the image': 1}
    data = json.loads((tmp_path / 'out/annotations/instances_all.json').read_text())
    assert [i['file_name'] for i in data['images']] == ['a.jpg']
    wanted = sum(pixels([np.ravel(part).tolist()]) for part in parts).astype(bool)
    cat = data['annotations'][0]
    assert (pixels(cat['segmentation']) == wanted).all()
    assert cat['area'] == wanted.sum()
    assert (tmp_path / 'out/images/a.jpg').is_file()


def test_real_files(real_data):
    folder = real_data / 'labelme_real'
    assert LabelmeReader.detect(folder)
    source = LabelmeReader.open(folder, {})
    assert source.classes == ['bottle', 'bus', 'car', 'chair', 'person', 'sofa']
    records = [source.read(item) for item in source.items()]
    assert [len(record.instances) for record in records] == [3, 6, 3]
    assert [record.problems + record.notes for record in records] == [[], [], []]
    sofa = records[1].instances[-1]
    assert (sofa.category, len(sofa.segmentation)) == ('sofa', 4)


def test_messages_stay_short_whatever_the_file_holds(tmp_path):
    long: list = [['x' * 9000] * 50] * 50
    problems = one(tmp_path, shape(kind=long), shape(kind='y' * 9000)).problems
    problems += one(tmp_path, shape(), imageWidth=long).problems
    assert codes(problems) == ['labelme-shape-unknown', 'labelme-shape-unknown', 'labelme-size']
    assert max(len(str(problem)) for problem in problems) < 300
