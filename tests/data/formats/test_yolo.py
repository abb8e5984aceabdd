from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.formats import yolo
from mmfinetune.data.formats.yolo import YoloReader
from mmfinetune.data.prepare import prepare
from mmfinetune.data.records import Record
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.images import find_images
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import codes, message, refused

WIDTH, HEIGHT = 80, 40
SQUARE = '0 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75'


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, 'grey').save(path, **save)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def site(root: Path, *lines: str, yaml: str = 'names: [cat, dog]\ntrain: images\n') -> Path:
    """A data set of one image with these lines."""
    image(root / 'images/a.jpg')
    write(root / 'labels/a.txt', '\n'.join(lines))
    write(root / 'data.yaml', yaml)
    return root


def read(root: Path, **options) -> list[Record]:
    source = pickle.loads(pickle.dumps(YoloReader.open(root, options)))
    return [source.read(item) for item in source.items()]


def listing(root: Path) -> list[tuple[str | None, str]]:
    source = YoloReader.open(root, {})
    return [(item.split, item.key) for item in source.items()]


def pixels(polygons: list) -> np.ndarray:
    return mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, HEIGHT, WIDTH))).astype(bool)


def test_a_polygon_covers_its_pixels(tmp_path):
    site(tmp_path, SQUARE, '1 0 0 1 0 1 1')
    (record,) = read(tmp_path / 'images' / '..')
    assert (record.problems, record.notes) == ([], [])
    assert (record.width, record.height) == (WIDTH, HEIGHT)
    cat, dog = record.instances
    assert [cat.category, dog.category] == ['cat', 'dog']
    assert [cat.place, dog.place] == ['line 1', 'line 2']
    assert cat.segmentation == [[20, 10, 40, 10, 40, 30, 20, 30]]
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[10:30, 20:40] = True
    assert (pixels(cat.segmentation) == wanted).all()


def test_a_bridge_of_no_width_stays_and_covers_nothing(tmp_path):
    # Two squares joined as Ultralytics' merge_multi_segment does it: there and back on one line.
    bridge = '0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6 0.1 0.2 0.6 0.2 0.9 0.2 0.9 0.6 0.6 0.6 0.6 0.2'
    (record,) = read(site(tmp_path, bridge))
    (instance,) = record.instances
    assert len(instance.segmentation) == 1 and len(instance.segmentation[0]) == 20
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[8:24, 8:24] = wanted[8:24, 48:72] = True
    assert (pixels(instance.segmentation) == wanted).all()


@pytest.mark.parametrize(
    'line, problem',
    [
        ('0 0.5 0.5 0.2 0.2', message('yolo-box')),
        ('0 0.5 0.5 0.2', message('yolo-odd', count=3)),
        ('0 0.5 0.5 0.2 0.2 0.3', message('yolo-odd', count=5)),
        (SQUARE + ' 0.93', message('yolo-odd', count=9)),
        ('0 0.5 0.5', message('yolo-points', count=1)),
        ('0', message('yolo-points', count=0)),
        ('2 0 0 1 0 1 1', message('yolo-class', number='2', last=1)),
        ('-1 0 0 1 0 1 1', message('yolo-class', number='-1', last=1)),
        ('0.5 0 0 1 0 1 1', message('yolo-class', number='0.5', last=1)),
        ('nan 0 0 1 0 1 1', message('yolo-nan')),
        ('0 0 0 1 nan 1 1', message('yolo-nan')),
        ('0 0 0 1 inf 1 1', message('yolo-nan')),
        ('cat 0 0 1 0 1 1', message('yolo-word', word='cat')),
        ('0, 0, 0, 1, 0, 1, 1', message('yolo-word', word='0,')),
        ('0 0 0 1 0 1 1.02', message('yolo-coordinate', value=1.02)),
        ('0 0 -0.2 1 0 1 1', message('yolo-coordinate', value=-0.2)),
        ('0 20 10 40 10 40 30', message('yolo-pixels', value=20.0)),
    ],
)
def test_bad_lines_are_told_with_their_place(tmp_path, line, problem):
    (record,) = read(site(tmp_path, SQUARE, '', line))
    assert record.problems == [problem.at('labels/a.txt, line 3')]


def test_all_bad_lines_of_a_file_are_told(tmp_path):
    (record,) = read(site(tmp_path, '0 1', SQUARE, '7 0 0 1 0 1 1'))
    assert [m.facts['place'] for m in record.problems] == ['labels/a.txt, line 1', 'labels/a.txt, line 3']


def test_boxes_become_masks_only_on_demand(tmp_path):
    (record,) = read(site(tmp_path, '0 0.5 0.5 0.25 0.5'), boxes_as_masks=True)
    assert record.problems == []
    assert record.instances[0].segmentation == [[30, 10, 50, 10, 50, 30, 30, 30]]


def test_coordinates_just_outside_are_cut(tmp_path):
    (record,) = read(site(tmp_path, '0 -1e-7 0 1.0000001 0 1 1', '1 0 0 1.009 0.001 0.5 1'))
    assert record.problems == []
    # Rounding is not worth a word, most of a pixel is not either, more is.
    assert record.notes == []
    assert record.instances[0].segmentation == [[0, 0, 80, 0, 80, 40]]
    large = site(tmp_path / 'large', '1 0 0 1.009 0.001 0.5 1')
    image(large / 'images/a.jpg', (800, 400))
    (record,) = read(large)
    (note,) = record.notes
    assert (note.code, note.facts['place']) == ('yolo-outside', 'labels/a.txt, line 1')
    assert note.facts['pixels'] == pytest.approx(7.2)
    assert record.instances[0].segmentation[0][2] == 800


def test_repeated_lines_are_one_object(tmp_path):
    (record,) = read(site(tmp_path, SQUARE, '1 0 0 1 0 1 1', SQUARE.replace(' ', '  ')))
    assert [i.place for i in record.instances] == ['line 1', 'line 2']
    assert record.notes == [message('yolo-line-repeated', place='labels/a.txt, line 3', first=1)]


def test_images_without_labels_are_background(tmp_path):
    site(tmp_path, SQUARE)
    image(tmp_path / 'images/empty.png')
    write(tmp_path / 'labels/empty.txt', '\n')
    image(tmp_path / 'images/none.png')
    source = YoloReader.open(tmp_path, {})
    records = [source.read(item) for item in source.items()]
    assert [(r.image.name, r.problems, len(r.instances)) for r in records] == [
        ('a.jpg', [], 1),
        ('empty.png', [], 0),
        ('none.png', [], 0),
    ]
    assert source.notes == [message('yolo-background', count=1, images=3)]


def test_labels_without_an_image_are_told(tmp_path):
    site(tmp_path, SQUARE, yaml='names: [cat, dog]\ntrain: images/train\n')
    image(tmp_path / 'images/train/b.jpg')
    write(tmp_path / 'labels/train/b.txt', SQUARE)
    write(tmp_path / 'labels/train/gone 10.txt', SQUARE)
    write(tmp_path / 'labels/train/gone 9.txt', SQUARE)
    write(tmp_path / 'labels/train/inner/gone.txt', SQUARE)
    write(tmp_path / 'labels/train/classes.txt', 'cat\ndog')
    assert YoloReader.open(tmp_path, {}).problems == [
        message('yolo-no-image', place=f'labels/train/{name}.txt') for name in ('gone 9', 'gone 10', 'inner/gone')
    ]


@pytest.mark.parametrize(
    'content, problem',
    [
        (b'\xff\xfe\x00', message('text-file-encoding', byte=2, place='labels/a.txt')),
        ('0 0 0 1 0 1 1 ü'.encode('latin-1'), message('text-file-encoding', byte=14, place='labels/a.txt')),
        (b'\x00\x01\x02', message('yolo-word', word='\x00\x01\x02', place='labels/a.txt, line 1')),
    ],
    ids=['odd UTF-16', 'Latin-1', 'binary'],
)
def test_label_files_that_are_no_text(tmp_path, content, problem):
    site(tmp_path, SQUARE)
    (tmp_path / 'labels/a.txt').write_bytes(content)
    (record,) = read(tmp_path)
    assert record.problems == [problem]


def test_byte_order_marks_spaces_and_any_script(tmp_path):
    site(tmp_path, yaml='\ufeffnames: [Katze 猫, dog]\ntrain: images\n')
    image(tmp_path / 'images/ein Bild 猫.jpg')
    write(tmp_path / 'labels/ein Bild 猫.txt', '\ufeff' + SQUARE + '\r\n')
    by_name = {record.image.stem: record for record in read(tmp_path)}
    record = by_name['ein Bild 猫']
    assert record.problems == []
    assert [i.category for i in record.instances] == ['Katze 猫']


def test_damaged_and_turned_images(tmp_path):
    site(tmp_path, SQUARE)
    (tmp_path / 'images/a.jpg').write_bytes(b'')
    image(tmp_path / 'images/b.png').rename(tmp_path / 'images/b.jpg')
    write(tmp_path / 'labels/b.txt', SQUARE)
    exif = Image.Exif()
    exif[0x112] = 8
    image(tmp_path / 'images/c.jpg', (HEIGHT, WIDTH), exif=exif)
    write(tmp_path / 'labels/c.txt', SQUARE)
    a, b, c = read(tmp_path)
    assert a.problems == [message('image-file-empty', place='images/a.jpg')]
    assert (b.problems, len(b.instances)) == ([], 1)
    # Parts of the upright image, as Ultralytics sees it.
    assert (c.width, c.height) == (WIDTH, HEIGHT)
    assert c.instances[0].segmentation == b.instances[0].segmentation


@pytest.mark.parametrize(
    'yaml, keys',
    [
        ('train: images/train\nval: images/val', ['images/train/a.jpg', 'images/val/b.jpg']),
        ('path: .\ntrain: images/train\nvalidation: images/val/', ['images/train/a.jpg', 'images/val/b.jpg']),
        ('path: /home/her/set\ntrain: ../images/train\nval: ../images/val', ['images/train/a.jpg', 'images/val/b.jpg']),
        (
            'path: images\ntrain: [train]\nval: [val, extra]',
            ['images/train/a.jpg', 'images/val/b.jpg', 'images/extra/c.jpg'],
        ),
        ('train: train.txt\nval: lists/val.txt', ['images/train/a.jpg', 'images/val/b.jpg', 'images/extra/c.jpg']),
        ('train: images\\train\nval: images/val\ntest: images/val', ['images/train/a.jpg', 'images/val/b.jpg']),
        ('train: images/train\nval: images/val\ntest:', ['images/train/a.jpg', 'images/val/b.jpg']),
    ],
    ids=['folders', 'validation', 'Roboflow', 'lists of folders', 'text files', 'test is val', 'no test'],
)
def test_images_are_found_by_the_yaml(tmp_path, yaml, keys):
    for name in ('train/a', 'val/b', 'extra/c'):
        image(tmp_path / f'images/{name}.jpg')
        write(tmp_path / f'labels/{name}.txt', SQUARE)
    write(tmp_path / 'train.txt', './images/train/a.jpg\n\n')
    write(tmp_path / 'lists/val.txt', 'images/val/b.jpg\n/home/her/set/images/extra/c.jpg\n')
    write(tmp_path / 'data.yaml', 'names: [cat]\n' + yaml)
    source = YoloReader.open(tmp_path, {})
    found = [(item.split, item.key) for item in source.items()]
    assert found == [('train' if key.endswith('a.jpg') else 'val', key) for key in keys]
    assert all(len(source.read(item).instances) == 1 for item in source.items())
    assert source.problems == []
    assert codes(source.notes) == (['yolo-test-is-val'] if 'test: i' in yaml else [])


@pytest.mark.parametrize('entry', ['" "', '[" "]', '["", "."]', '.'])
def test_a_whole_disk_is_no_data_set(tmp_path, entry, monkeypatch):
    site(tmp_path, SQUARE)
    write(tmp_path / 'data.yaml', f'names: [cat]\npath: /\ntrain: images\nval: {entry}')
    asked = []
    monkeypatch.setattr(yolo, 'find_images', lambda folder: asked.append(folder) or find_images(folder))
    with contextlib.suppress(UserError):
        YoloReader.open(tmp_path, {})
    assert all(folder.is_relative_to(tmp_path) for folder in asked)


@pytest.mark.parametrize('name', ['"a\\0b"', 'x' * 5000])
@pytest.mark.parametrize('key', ['path', 'train', 'val'])
def test_names_that_no_file_can_have(tmp_path, key, name):
    site(tmp_path, SQUARE)
    keys = {'path': '.', 'train': 'images', key: name}
    write(tmp_path / 'data.yaml', 'names: [cat]\n' + ''.join(f'{k}: {v}\n' for k, v in keys.items()))
    if key == 'path':  # as that of another machine
        assert len(YoloReader.open(tmp_path, {}).items()) == 1
        return
    with refused('yolo-images') as caught:
        YoloReader.open(tmp_path, {})
    assert codes(caught.value.problems) == ['yolo-entry-missing']


def test_a_data_set_may_lie_elsewhere_than_its_yaml(tmp_path):
    site(tmp_path / 'data', SQUARE).joinpath('data.yaml').unlink()
    path = write(tmp_path / 'yaml/mine.yaml', f'names: [cat]\npath: {tmp_path}/data\ntrain: images')
    for root in (path, path.parent):
        source = YoloReader.open(root, {})
        record = source.read(source.items()[0])
        assert (record.problems, len(record.instances)) == ([], 1)
        assert codes(source.notes) == ['yolo-elsewhere']


@pytest.mark.parametrize(
    'name', ['../other/images', '{tmp}/other/images', 'images/../../other/images', '/dev', '/dev/zero']
)
def test_nothing_outside_the_data_set_is_taken(tmp_path, name):
    site(tmp_path / 'other', SQUARE)
    name = name.format(tmp=tmp_path)
    root = site(tmp_path / 'set', SQUARE, yaml=f'names: [cat]\ntrain: {name}')
    with refused('yolo-images') as caught:
        YoloReader.open(root, {})
    assert codes(caught.value.problems) == ['yolo-entry-outside']
    if 'other' in name:
        (record,) = read(root, image_root=tmp_path / 'other')
        assert record.image == tmp_path / 'other/images/a.jpg'
        assert len(record.instances) == 1


def test_no_listed_image_outside_the_data_set_is_taken(tmp_path):
    outside = image(tmp_path / 'b.jpg')
    root = site(tmp_path / 'set', SQUARE, yaml='names: [cat]\ntrain: list.txt')
    path = write(root / 'list.txt', f'images/a.jpg\n../b.jpg\n{outside}\n/etc/hostname')
    with refused('yolo-images') as caught:
        YoloReader.open(root, {})
    names = {2: '../b.jpg', 3: str(outside), 4: '/etc/hostname'}
    assert caught.value.problems == [
        message('yolo-listed-outside', path=path, line=k, name=n) for k, n in names.items()
    ]
    write(path, 'images/a.jpg\n../b.jpg')
    assert len(read(root, image_root=tmp_path)) == 2


def test_ones_own_links_work(tmp_path):
    site(tmp_path / 'disk', SQUARE)
    root = site(tmp_path / 'set', SQUARE)
    for name in ('images', 'labels'):
        (root / name).rename(tmp_path / name)
        (root / name).symlink_to(tmp_path / 'disk' / name)
    (record,) = read(root)
    assert (record.problems, len(record.instances)) == ([], 1)


@pytest.mark.parametrize('kind', STRANGE)
def test_labels_that_are_no_files(tmp_path, kind):
    site(tmp_path, SQUARE)
    image(tmp_path / 'images/b.jpg')
    strange(tmp_path / 'labels/b.txt', kind)
    (_, record) = read(tmp_path)
    assert codes(record.problems) == ['text-file-unreadable']


@pytest.mark.parametrize(
    'text, names',
    [
        ('names: [cat, dog]\nnc: 2', ['cat', 'dog']),
        ('names:\n  1: dog\n  0: cat', ['cat', 'dog']),
        ('names: {"0": cat, "1": dog}', ['cat', 'dog']),
        ('names: [1, 2]', ['1', '2']),
        ('nc: 2', ['class_0', 'class_1']),
    ],
)
def test_class_names(tmp_path, text, names):
    site(tmp_path, SQUARE, yaml=text + '\ntrain: images')
    assert YoloReader.open(tmp_path, {}).classes == names


@pytest.mark.parametrize(
    'text, problems',
    [
        ('names: [cat, dog]\nnc: 3', [message('yolo-count', nc='3', names=2)]),
        ('names: {0: cat, 2: dog}', [message('yolo-name-keys', last=1)]),
        ('names: {a: cat}', [message('yolo-name-keys', last=0)]),
        ('names: [yes, cat]', [message('yolo-name', name='True')]),
        ('names: [cat, cat]', [message('yolo-name-repeated', name='cat', times=2)]),
        ('names: cat', [message('yolo-names')]),
        ('nc: 999999999999', [message('yolo-names')]),
        ('names: {.inf: cat}', [message('yolo-name-keys', last=0)]),
        ('names: [[a, [b]], cat]', [message('yolo-name', name="['a', ['b']]")]),
        ('names: [0x' + 'f' * 5000 + ']', [message('yolo-name', name='an integer of 20000 bits')]),
        ('names: [cat]\nnc: 0x' + 'f' * 5000, [message('yolo-count', nc='an integer of 20000 bits', names=1)]),
        ('names: []', [message('yolo-names')]),
        ('colour: red', [message('yolo-names')]),
    ],
)
def test_bad_class_names(tmp_path, text, problems):
    site(tmp_path, SQUARE, yaml=text + '\ntrain: images')
    with refused('yolo-classes', path=tmp_path / 'data.yaml') as caught:
        YoloReader.open(tmp_path, {})
    assert [line for line in problems if line not in caught.value.problems] == []


@pytest.mark.parametrize(
    'text, code, problems',
    [
        (
            'names: [cat\ntrain: images',
            'yolo-unreadable',
            [message('yaml-syntax', line=2, reason="did not find expected ',' or ']'")],
        ),
        ('- cat', 'yolo-no-keys', []),
        ('names: [cat]', 'yolo-images', [message('yolo-no-splits')]),
        (
            'names: [cat]\ntrain: gone\nval: [gone2]',
            'yolo-images',
            [
                message('yolo-entry-missing', key='train', entry='gone'),
                message('yolo-entry-missing', key='val', entry='gone2'),
            ],
        ),
        ('names: [cat]\ntrain: 7', 'yolo-images', [message('yolo-entry-missing', key='train', entry='7')]),
        ('names: [cat]\ntrain: empty', 'yolo-images', [message('yolo-entry-empty', key='train', entries='empty')]),
        ('names: [cat]\ntrain: list.txt', 'yolo-images', None),
        (
            'names: [cat]\ntrain: ' + 'a' * 9000,
            'yolo-images',
            [message('yolo-entry-missing', key='train', entry="'" + 'a' * 27 + '...' + 'a' * 6 + '…')],
        ),
        (
            'names: [cat]\npath: ' + 'a' * 9000 + '\ntrain: gone',
            'yolo-images',
            [message('yolo-entry-missing', key='train', entry='gone')],
        ),
        (
            'names: [cat]\npath: [1, 2]\ntrain: "a\\0b"',
            'yolo-images',
            [message('yolo-entry-missing', key='train', entry='a\0b')],
        ),
    ],
)
def test_bad_yaml(tmp_path, text, code, problems):
    site(tmp_path, SQUARE, yaml=text)
    (tmp_path / 'empty').mkdir()
    # The last is another image, whose name alone is no proof.
    lines = write(tmp_path / 'list.txt', 'images/a.jpg\nimages/gone.jpg\nx.jpg\n/home/her/top.jpg')
    image(tmp_path / 'top.jpg')
    with refused(code, path=tmp_path / 'data.yaml') as caught:
        YoloReader.open(tmp_path, {})
    if problems is None:
        missing = {2: 'images/gone.jpg', 3: 'x.jpg', 4: '/home/her/top.jpg'}
        problems = [message('yolo-listed-missing', path=lines, line=k, name=name) for k, name in missing.items()]
    assert caught.value.problems == problems


def test_which_of_several_yaml_files(tmp_path):
    site(tmp_path, SQUARE)
    write(tmp_path / 'other.yaml', 'names: [x]\ntrain: gone')
    assert YoloReader.open(tmp_path, {}).classes == ['cat', 'dog']
    (tmp_path / 'data.yaml').rename(tmp_path / 'mine.yaml')
    with refused('yolo-yamls') as caught:
        YoloReader.open(tmp_path, {})
    assert caught.value.problems == ['mine.yaml', 'other.yaml']


def test_without_a_yaml(tmp_path):
    site(tmp_path, SQUARE).joinpath('data.yaml').unlink()
    image(tmp_path / 'images/val/b.jpg')
    write(tmp_path / 'labels/val/b.txt', SQUARE)
    with refused('yolo-no-classes') as caught:
        YoloReader.open(tmp_path, {})
    assert '--classes' in caught.value.hint
    assert YoloReader.open(tmp_path, {'classes': ['x']}).classes == ['x']
    write(tmp_path / 'classes.txt', 'cat\ndog\n')
    assert YoloReader.open(tmp_path, {}).classes == ['cat', 'dog']
    assert listing(tmp_path) == [(None, 'images/a.jpg'), ('val', 'images/val/b.jpg')]
    assert YoloReader.detect(tmp_path) == ('images/ and labels/ with lines of numbers (labels/a.txt)')


def test_labels_beside_the_images(tmp_path):
    image(tmp_path / 'train/a.jpg')
    write(tmp_path / 'train/a.txt', SQUARE)
    write(tmp_path / 'train/notes.txt', 'anything')
    write(tmp_path / 'data.yaml', 'names: [cat]\ntrain: train')
    source = YoloReader.open(tmp_path, {})
    assert source.problems == []
    assert len(source.read(source.items()[0]).instances) == 1


def test_no_labels_at_all_is_an_error(tmp_path):
    site(tmp_path, SQUARE)
    (tmp_path / 'labels').rename(tmp_path / 'label')
    with refused('yolo-no-labels', count=1, image='images/a.jpg', label='labels/a.txt'):
        YoloReader.open(tmp_path, {})


def test_folders_above_the_data_set_have_no_say(tmp_path):
    root = tmp_path / 'images' / 'set'
    image(root / 'train/a.jpg')
    write(root / 'train/a.txt', SQUARE)
    write(root / 'data.yaml', 'names: [cat]\ntrain: train')
    (record,) = read(root)
    assert len(record.instances) == 1


def test_detect(tmp_path):
    assert YoloReader.detect(tmp_path / 'nothing') is None
    site(tmp_path / 'ours', SQUARE)
    assert YoloReader.detect(tmp_path / 'ours') == ('data.yaml with class names and image folders')
    write(tmp_path / 'other/data.yaml', 'colour: red')
    write(tmp_path / 'other/broken.yaml', 'a: [')
    image(tmp_path / 'other/images/a.jpg')
    write(tmp_path / 'other/labels/a.txt', 'The labels are elsewhere.')
    assert YoloReader.detect(tmp_path / 'other') is None


def test_prepared_json_has_the_polygons_pixels(tmp_path):
    site(
        tmp_path / 'src',
        SQUARE,
        '1 0.1 0.1 0.6 0.2 0.3 0.9',
        '1 0.5 0.5 0.5 0.5 0.5 0.5',
        yaml='names: [cat, dog]\ntrain: images\nval: more/images',
    )
    image(tmp_path / 'src/more/images/b.jpg')
    summary = prepare(tmp_path / 'src', tmp_path / 'out', 'yolo', workers=1, progress=False)
    assert {name: (split.images, split.objects, split.empty) for name, split in summary.splits.items()} == {
        'train': (1, 2, 0),
        'val': (1, 0, 1),
    }
    assert summary.dropped == {'without a pixel in the image': 1}
    data = json.loads((tmp_path / 'out/annotations/instances_train.json').read_text())
    assert [c['name'] for c in data['categories']] == ['cat', 'dog']
    dog = data['annotations'][1]
    wanted = pixels([[8, 4, 48, 8, 24, 36]])
    assert (pixels(dog['segmentation']) == wanted).all()
    assert dog['area'] == wanted.sum()
    assert (tmp_path / 'out/images' / data['images'][0]['file_name']).is_file()


def test_pose_labels_are_refused(tmp_path):
    site(tmp_path, SQUARE, yaml='names: [cat]\ntrain: images\nkpt_shape: [17, 3]')
    with refused('yolo-pose', path=tmp_path / 'data.yaml'):
        YoloReader.open(tmp_path, {})
