"""COCO JSON of all makes: what is made regular, what is refused, and that masks stay the same."""

from __future__ import annotations

import json
import math
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mmfinetune.data.formats import detect
from mmfinetune.data.formats.coco import Coco2017Reader, CocoReader
from mmfinetune.data.prepare import prepare
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.masks import mask_to_rle
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import codes, message, refused

W, H = 48, 32
TRIANGLE = [4.5, 3.0, 30.25, 5.0, 12.0, 25.75]
SQUARE = [30, 10, 40, 10, 40, 20, 30, 20]


def ring() -> np.ndarray:
    ys, xs = np.mgrid[:H, :W]
    distance = np.hypot(ys - 15, xs - 20)
    return ((distance < 12) & (distance > 6)).astype(np.uint8)


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {'size': list(mask.shape), 'counts': ([0] if flat[0] else []) + counts}


def dataset(images: int = 3) -> dict[str, Any]:
    """A COCO file with polygons, RLE of both makes and a crowd region in each image."""
    data: dict[str, Any] = {
        'info': {'description': 'made', 'year': 2026},
        'licenses': [{'id': 1, 'name': 'CC0'}],
        'images': [
            {'id': 10 + k, 'file_name': f'img{k}.jpg', 'width': W, 'height': H, 'license': 1} for k in range(images)
        ],
        'annotations': [],
        'categories': [{'id': 2, 'name': 'cat', 'supercategory': 'animal'}, {'id': 7, 'name': 'dog'}],
    }
    for image in data['images']:
        for category, crowd, shape in (
            (2, 0, [TRIANGLE]),
            (7, 0, [TRIANGLE, SQUARE]),
            (2, 0, uncompressed(ring())),
            (7, 0, mask_to_rle(ring())),
            (2, 1, uncompressed(ring())),
        ):
            data['annotations'].append(
                {
                    'id': len(data['annotations']) + 1,
                    'image_id': image['id'],
                    'category_id': category,
                    'iscrowd': crowd,
                    'segmentation': shape,
                    'bbox': [1, 2, 3, 4],
                    'area': 5.0,
                }
            )
    return data


def write_images(folder: Path, data: dict[str, Any]) -> None:
    for image in data['images']:
        path = folder / image['file_name']
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (W, H), (1, 2, 3)).save(path)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """`src/annotations/instances_train.json` and `src/images/`."""
    src = tmp_path / 'src'
    (src / 'annotations').mkdir(parents=True)
    data = dataset()
    write_images(src / 'images', data)
    (src / 'annotations/instances_train.json').write_text(json.dumps(data))
    return tmp_path


def run(site: Path, change: Callable[[dict[str, Any]], Any] | None = None, **options: Any):
    """Prepare the site after a change of its JSON, and return what was written."""
    path = site / 'src/annotations/instances_train.json'
    if change:
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))
    options = {'workers': 1, 'progress': False, **options}
    summary = prepare(site / 'src', site / 'out', options.pop('format', 'coco'), **options)
    return summary, json.loads((site / 'out/annotations/instances_train.json').read_text())


def decoded(annotation: dict[str, Any]) -> np.ndarray:
    shape = annotation['segmentation']
    if isinstance(shape, list):
        shape = mask_api.merge(mask_api.frPyObjects(shape, H, W))
    elif isinstance(shape['counts'], list):
        shape = mask_api.frPyObjects(shape, H, W)
    return mask_api.decode(shape)


def test_masks_stay_the_same_and_boxes_and_areas_are_theirs(site):
    before = dataset()['annotations']
    summary, data = run(site)
    after = data['annotations']
    assert [a['id'] for a in after] == list(range(1, 16))
    assert [a['iscrowd'] for a in after] == [0, 0, 0, 0, 1] * 3
    for old, new in zip(before, after, strict=True):
        mask = decoded(new)
        assert (mask == decoded(old)).all()
        assert new['area'] == mask.sum()
        ys, xs = np.nonzero(mask)
        assert new['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert isinstance(new['segmentation'], list) == isinstance(old['segmentation'], list)
    assert after[1]['segmentation'] == [TRIANGLE, SQUARE]
    split = summary.splits['train']
    assert (split.images, split.objects, split.crowds, split.empty) == (3, 12, 3, 0)
    assert split.per_class == {'cat': 6, 'dog': 6}


def test_ids_header_and_further_keys_are_kept(site):
    def change(data):
        data['annotations'][0] |= {'attributes': {'occluded': True}, 'score': float('nan')}
        data['annotations'][1]['attributes'] = {'occluded': False}

    summary, data = run(site, change)
    assert [c['id'] for c in data['categories']] == [2, 7]
    assert data['categories'][0]['supercategory'] == 'animal'
    assert [i['id'] for i in data['images']] == [10, 11, 12]
    assert data['images'][0]['license'] == 1 and data['licenses'] == [{'id': 1, 'name': 'CC0'}]
    assert data['info']['year'] == 2026
    assert 'attributes' not in data['annotations'][0]
    assert data['annotations'][1]['attributes'] == {'occluded': False}
    assert [note.facts['keys'] for note in summary.notes] == ['attributes, score']


@pytest.mark.parametrize(
    'ids',
    [[0, 1], [7, 2], ['a', 'b'], [1.5, 2.5], [3, '4']],
    ids=['zero', 'descending', 'text', 'fractions', 'number_as_text'],
)
def test_category_ids_that_would_not_serve_become_1_to_n(site, ids):
    def change(data):
        for entry, new in zip(data['categories'], ids, strict=True):
            for annotation in data['annotations']:
                if annotation['category_id'] == entry['id']:
                    annotation['category_id'] = f'new {new}'
            entry['id'] = new
        for annotation in data['annotations']:
            annotation['category_id'] = {f'new {new}': new for new in ids}[annotation['category_id']]

    if ids == [1.5, 2.5]:
        with refused('coco-files') as caught:
            run(site, change)
        assert codes(caught.value.problems) == ['coco-category'] * 2
        return
    _, data = run(site, change)
    assert [c['id'] for c in data['categories']] == ([3, 4] if ids == [3, '4'] else [1, 2])
    names = {c['id']: c['name'] for c in data['categories']}
    assert [names[a['category_id']] for a in data['annotations'][:2]] == ['cat', 'dog']


@pytest.mark.parametrize(
    'new_id, kept',
    [
        (lambda k: f'{k}', True),
        (lambda k: float(k), True),
        (lambda k: f'img{k}', False),
        (lambda k: -k, False),
        (lambda k: 1 << 60 | k, False),
    ],
)
def test_image_ids_of_any_type_find_their_annotations(site, new_id, kept):
    def change(data):
        for entry in data['images']:
            entry['id'] = new_id(entry['id'])
        for annotation in data['annotations']:
            annotation['image_id'] = new_id(annotation['image_id'])

    _, data = run(site, change)
    assert [i['id'] for i in data['images']] == ([10, 11, 12] if kept else [1, 2, 3])
    assert [a['image_id'] for a in data['annotations']][::5] == [i['id'] for i in data['images']]


def test_annotation_ids_are_new(site):
    def change(data):
        for annotation, new in zip(data['annotations'], [0, 5, 5, None, 'x'], strict=False):
            annotation['id'] = new
        del data['annotations'][7]['id']

    summary, data = run(site, change)
    assert [a['id'] for a in data['annotations']] == list(range(1, 16))
    assert summary.notes == [message('coco-ids-new', place='annotations/instances_train.json', count=3)]


@pytest.mark.parametrize(
    'shape, wanted',
    [
        (TRIANGLE, [TRIANGLE]),
        ([[[4.5, 3.0], [30.25, 5.0], [12.0, 25.75]]], [TRIANGLE]),
        ([TRIANGLE, [1, 1, 2, 2]], [TRIANGLE]),
        ([TRIANGLE, []], [TRIANGLE]),
    ],
)
def test_polygons_of_other_makes(site, shape, wanted):
    def change(data):
        data['annotations'][0]['segmentation'] = shape

    _, data = run(site, change)
    assert data['annotations'][0]['segmentation'] == wanted


@pytest.mark.parametrize(
    'shape, reason',
    [
        ([[1, 1, 5, 5]], 'without area (fewer than 3 points)'),
        ([[-9, -9, -5, -9, -5, -5]], 'without a pixel in the image'),
        ([[5, 5, 5, 5, 5, 5]], 'without a pixel in the image'),
        ({'size': [H, W], 'counts': [H * W]}, 'without a pixel in the image'),
    ],
)
def test_objects_without_pixels_are_left_out_and_counted(site, shape, reason):
    def change(data):
        data['annotations'][0]['segmentation'] = shape

    summary, data = run(site, change)
    assert summary.dropped == {reason: 1}
    assert len(data['annotations']) == 14


def put(key: str, value: Any, what: str = 'annotations', place: int = 0) -> Callable:
    def change(data):
        data[what][place][key] = value

    return change


def drop(key: str, what: str = 'annotations') -> Callable:
    def change(data):
        del data[what][0][key]

    return change


LABEL_FILE = 'annotations/instances_train.json'
IMAGE = f'{LABEL_FILE}: image 10 (img0.jpg)'

# A change of one image or annotation, and the problem that it is.
BAD_PARTS = [
    (put('segmentation', []), message('coco-only-box')),
    (put('segmentation', [[]]), message('coco-only-box')),
    (put('segmentation', None), message('coco-only-box')),
    (drop('segmentation'), message('coco-only-box')),
    (put('segmentation', 'abc'), message('coco-segmentation', value="'abc'")),
    (put('segmentation', 7), message('coco-segmentation', value='7')),
    (put('segmentation', [[0, 0, 5, 0, 5]]), message('shape-polygon-odd', count=5)),
    (put('segmentation', [[0, 0, math.nan, 0, 5, 5]]), message('shape-polygon-nan')),
    (put('segmentation', [[0, 0, math.inf, 0, 5, 5]]), message('shape-polygon-nan')),
    (put('segmentation', [[0, 0, 1e9, 0, 5, 5]]), message('shape-polygon-far', value='1000000000.0')),
    (put('segmentation', [[0, 0, 10**400, 0, 5, 5]]), message('shape-polygon-far')),
    (put('segmentation', [['0', 0, 5, 0, 5, 5]]), message('shape-polygon-number', value="'0'")),
    (put('segmentation', {'size': [W, H], 'counts': 'abc'}), message('shape-rle-size', size='[48, 32]')),
    (put('segmentation', {'size': [H, W], 'counts': 'zzzz'}), message('shape-rle-damaged')),
    (put('segmentation', {'size': [H, W], 'counts': [5]}), message('shape-rle-pixels', pixels=5, wanted=1536)),
    (put('segmentation', {'counts': [5]}), message('shape-rle-keys')),
    (put('category_id', 99), message('coco-category-unknown', category='99')),
    (put('category_id', None), message('coco-category-unknown', category='None')),
    (put('category_id', [2]), message('coco-category-unknown', category='[2]')),
    (put('category_id', True), message('coco-category-unknown', category='True')),
    (put('iscrowd', 2), message('coco-iscrowd', value='2')),
    (put('iscrowd', '0'), message('coco-iscrowd', value="'0'")),
    (put('image_id', 99), message('coco-stray', place=LABEL_FILE, value='1', image='99')),
    (put('image_id', None), message('coco-stray', place=LABEL_FILE, value='1', image='None')),
    (put('width', 0, 'images'), message('coco-size', place=IMAGE, width='0', height='32')),
    (put('width', '48', 'images'), message('coco-size', place=IMAGE, width="'48'", height='32')),
    (put('width', math.nan, 'images'), message('coco-size', place=IMAGE, width='nan', height='32')),
    (
        put('width', 50, 'images'),
        message('coco-other-size', place=IMAGE, image='images/img0.jpg', found='48x32', named='50x32'),
    ),
    (
        put('file_name', 'none.jpg', 'images'),
        message('image-file-missing', place=f'{LABEL_FILE}: image 10 (none.jpg): images/none.jpg'),
    ),
    (put('file_name', '../../../../etc/hostname', 'images'), message('image-file-missing')),
    (put('file_name', '', 'images'), message('coco-image-name', place=f'{LABEL_FILE}: image 10', name="''")),
    (put('file_name', None, 'images'), message('coco-image-name', place=f'{LABEL_FILE}: image 10', name='None')),
    (put('file_name', 'a\0b.jpg', 'images'), message('coco-image-name')),
    (put('file_name', 'x' * 300, 'images'), message('coco-image-name')),
    (put('file_name', '\ud800.jpg', 'images'), message('coco-image-name')),
    (put('file_name', '.', 'images'), message('image-file-unreadable')),
    (put('file_name', 'img1.jpg', 'images'), message('prepare-image-twice', splits='train')),
]


@pytest.mark.parametrize('change, problem', BAD_PARTS, ids=[repr(m) for _, m in BAD_PARTS])
def test_a_bad_part_forbids_its_image_alone(site, change, problem):
    if problem.code.startswith(('shape-', 'coco-only', 'coco-seg', 'coco-cat', 'coco-iscrowd')):
        problem = message(problem.code, place=f'{IMAGE}: annotation 1', **problem.facts)
    with refused('prepare-problems') as caught:
        run(site, change)
    (found,) = caught.value.problems
    assert found.code == problem.code
    assert problem.facts.items() <= found.facts.items()
    assert '--skip-bad' in caught.value.hint
    assert not (site / 'out').exists()
    summary, data = run(site, skip_bad=True)
    stray = problem.code == 'coco-stray'
    assert len(data['images']) == (3 if stray else 2)
    assert len(data['annotations']) == (14 if stray else 10)
    assert summary.problems == [found]
    json.dumps(data, allow_nan=False)
    report = json.loads((site / 'out/prepare_report.json').read_text())
    assert len(report['problems']) == 1


def replaced(**members: Any) -> Callable:
    def change(data):
        data.update(members)

    return change


def without(key: str) -> Callable:
    def change(data):
        del data[key]

    return change


def double_image_id(data):
    data['images'][1]['id'] = 10


def double_category(data):
    data['categories'][1]['name'] = ' cat '


def no_masks(data):
    for annotation in data['annotations']:
        annotation['segmentation'] = []


# A change of the whole file that makes it useless.
BAD_FILES = [
    (without('images'), message('coco-section-missing', section='images')),
    (without('annotations'), message('coco-section-missing', section='annotations')),
    (without('categories'), message('coco-section-missing', section='categories')),
    (replaced(images=None), message('coco-section-type', section='images')),
    (replaced(annotations={'a': 1}), message('coco-section-type', section='annotations')),
    (replaced(categories=3), message('coco-section-type', section='categories')),
    (replaced(categories=[]), message('coco-no-categories')),
    (replaced(categories=[{'id': 2}]), message('coco-category')),
    (replaced(categories=['cat']), message('coco-entry-type', section='categories', position=0)),
    (replaced(categories=[{'id': None, 'name': 'cat'}]), message('coco-category')),
    (replaced(categories=[{'id': 1, 'name': '\ud800'}]), message('class-encoding', name='\ud800')),
    (replaced(images=[3]), message('coco-entry-type', section='images')),
    (replaced(annotations=[None]), message('coco-entry-type', section='annotations')),
    (replaced(images=[]), message('coco-no-images')),
    (double_image_id, message('coco-image-id-repeated', value=10, count=2)),
    (double_category, message('coco-category-repeated', name='cat')),
    (put('id', 7, 'categories'), message('coco-category-id-repeated', value=7, name='cat', other='dog')),
    (put('id', None, 'images'), message('coco-image-id', name="'img0.jpg'", value='None')),
    (put('id', True, 'images'), message('coco-image-id', value='True')),
    (no_masks, message('coco-no-masks', count=15)),
]


@pytest.mark.parametrize('change, problem', BAD_FILES, ids=[repr(m) for _, m in BAD_FILES])
def test_a_useless_file_is_refused_in_one_message(site, change, problem):
    with pytest.raises(UserError) as caught:
        run(site, change, skip_bad=True)
    assert caught.value.code in ('coco-files', 'prepare-classes')
    found = caught.value.problems[0]
    assert found.code == problem.code and problem.facts.items() <= found.facts.items()
    assert not (site / 'out').exists()


@pytest.mark.parametrize(
    'text, code',
    [
        ('', 'not-json'),
        (' \n ', 'not-json'),
        ('[1, 2]', 'top-level'),
        ('null', 'top-level'),
        ('7', 'top-level'),
        ('"x"', 'top-level'),
        ('{"images": [{"id": 1', 'not-json'),
        ('{"images": [1 2]}', 'not-json'),
        ('{"images": []} x', 'not-json'),
        ('{1: 2}', 'not-json'),
        ('{"a": tru}', 'not-json'),
        ('{"images": [' + '[' * 200_000, 'nesting'),
        ('{"a": 1,}', 'not-json'),
        ('{"a" 1}', 'not-json'),
    ],
)
def test_no_json_is_told_with_the_place(site, text, code):
    (site / 'src' / LABEL_FILE).write_text(text)
    with refused('coco-files') as caught:
        prepare(site / 'src' / LABEL_FILE, site / 'out', progress=False)
    (found,) = caught.value.problems
    assert (found.code, found.facts['place']) == (f'coco-{code}', LABEL_FILE)
    assert code != 'not-json' or 'line 1 column' in found.facts['reason'] or 'line 2 column' in found.facts['reason']


def test_every_cut_of_a_file_is_one_clean_message(site):
    path = site / 'src/annotations/instances_train.json'
    data = path.read_bytes()
    for keep in range(0, len(data) - 1, 41):
        path.write_bytes(data[:keep])
        with refused('coco-files') as caught:
            CocoReader.open(path, {'progress': False})
        assert codes(caught.value.problems) == ['coco-not-json']


@pytest.mark.parametrize(
    'encode, wanted',
    [
        (lambda text: b'\xef\xbb\xbf' + text.encode(), None),
        (lambda text: text.encode(), None),
        (lambda text: text.encode('utf-16'), None),
        (lambda text: text.encode('latin-1'), 'coco-encoding'),
    ],
)
def test_text_beyond_ascii(site, encode, wanted):
    data = dataset()
    data['categories'][0]['name'] = 'Kätzchen'
    data['images'][0]['file_name'] = 'ünï çode 1.jpg'
    data['annotations'][0]['attributes'] = {'ö': 'ß'}
    write_images(site / 'src/images', data)
    path = site / 'src/annotations/instances_train.json'
    path.write_bytes(encode(json.dumps(data, ensure_ascii=False)))
    if wanted:
        with refused('coco-files') as caught:
            run(site)
        assert codes(caught.value.problems) == [wanted]
        return
    _, data = run(site)
    assert [c['name'] for c in data['categories']] == ['Kätzchen', 'dog']
    assert 'ünï çode 1.jpg' in [i['file_name'] for i in data['images']]
    assert [a['attributes'] for a in data['annotations'] if 'attributes' in a] == [{'ö': 'ß'}]


def test_boxes_become_masks_only_when_asked_for(site):
    def change(data):
        no_masks(data)
        data['annotations'][0]['bbox'] = [3, 4, 10.0, 5]
        data['annotations'][1]['bbox'] = [3, 4, 0, 5]
        data['annotations'][2]['bbox'] = [3, 4, 5]

    with refused('coco-files') as caught:
        run(site, change)
    assert codes(caught.value.problems) == ['coco-no-masks'] and '--boxes-as-masks' in caught.value.hint
    with refused('prepare-problems') as caught:
        run(site, boxes_as_masks=True)
    assert caught.value.problems == [
        message('coco-box-empty', place=f'{IMAGE}: annotation 2', width=0, height=5),
        message('coco-box', place=f'{IMAGE}: annotation 3', box='[3, 4, 5]'),
    ]
    _, data = run(site, put('bbox', [0, 0, 1, 1], place=1), boxes_as_masks=True, skip_bad=True)
    assert len(data['images']) == 2

    def repair(data):
        data['annotations'][2]['bbox'] = [1, 1, 2, 2]

    _, data = run(site, repair, boxes_as_masks=True, overwrite=True)
    assert data['annotations'][0]['bbox'] == [3, 4, 10, 5]
    assert data['annotations'][0]['area'] == 50


def test_size_missing_or_turned(site):
    def change(data):
        del data['images'][0]['width'], data['images'][0]['height']
        data['images'][1] |= {'width': float(W), 'height': float(H)}

    _, data = run(site, change)
    assert all((i['width'], i['height']) == (W, H) for i in data['images'])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (W, H)).save(site / 'src/images/img2.jpg', exif=exif)
    with refused('prepare-problems') as caught:
        run(site, overwrite=True)
    (problem,) = caught.value.problems
    assert (problem.code, problem.facts['found'], problem.facts['named']) == ('coco-size-turned', '32x48', '48x32')


@pytest.mark.parametrize(
    'spelling',
    [
        '/home/someone/data/sub/a b.jpg',
        'C:\\data\\sub\\a b.jpg',
        '../images/sub/a b.jpg',
        './sub/a b.jpg',
        'https://host/x/sub/a%20b.jpg',
        'images/sub/a b.jpg',
    ],
)
def test_image_names_of_other_machines(site, spelling):
    (site / 'src/images/sub').mkdir()
    (site / 'src/images/img0.jpg').rename(site / 'src/images/sub/a b.jpg')
    _, data = run(site, put('file_name', spelling, 'images'))
    assert sorted(i['file_name'] for i in data['images']) == ['img1.jpg', 'img2.jpg', 'sub/a b.jpg']
    assert (site / 'out/images/sub/a b.jpg').is_file()


@pytest.mark.parametrize('trusted', [False, True])
@pytest.mark.parametrize('placing', ['link', 'copy', 'reference'])
def test_nothing_outside_the_data_set_is_taken(site, trusted, placing):
    Image.new('RGB', (W, H)).save(site / 'secret.jpg')
    for name in ('../../secret.jpg', 'sub/../../../secret.jpg', str(site / 'secret.jpg'), '/dev/zero', '/etc/passwd'):
        with refused('prepare-problems') as caught:
            run(site, put('file_name', name, 'images'), trust_sizes=trusted, placing=placing)
        assert codes(caught.value.problems) == ['coco-image-outside' if trusted else 'image-file-missing']
        assert not (site / 'out').exists()
    run(site, trust_sizes=trusted, placing=placing, skip_bad=True)
    assert sorted(p.name for p in (site / 'out/images').iterdir() if p.name != 'img0.jpg') == ['img1.jpg', 'img2.jpg']


def test_trusted_names_of_other_machines_are_found_by_their_end(site):
    summary, data = run(site, put('file_name', '/home/someone/images/img0.jpg', 'images'), trust_sizes=True)
    assert sorted(i['file_name'] for i in data['images']) == ['img0.jpg', 'img1.jpg', 'img2.jpg']
    assert codes(summary.notes) == ['coco-images-elsewhere']


@pytest.mark.parametrize('kind', STRANGE)
@pytest.mark.parametrize('trusted', [False, True])
def test_what_is_no_file_is_no_image(site, kind, trusted):
    strange(site / 'src/images/img1.jpg', kind)
    with refused('prepare-problems') as caught:
        run(site, trust_sizes=trusted, placing='copy')
    assert codes(caught.value.problems) == ['image-file-unreadable']


@pytest.mark.parametrize('kind', STRANGE)
def test_what_is_no_file_is_no_annotation_file(site, kind):
    path = strange(site / 'src/annotations/instances_train.json', kind)
    with pytest.raises(UserError):
        run(site)
    with pytest.raises(UserError):
        prepare(path, site / 'out', 'coco', progress=False)


def test_links_of_ones_own_work_and_those_to_other_files_do_not(site):
    (site / 'src/images').rename(site / 'disk')
    (site / 'src/images').symlink_to('../disk')
    for trusted in (False, True):
        _, data = run(site, trust_sizes=trusted, overwrite=trusted)
        assert len(data['images']) == 3
        assert (site / 'out/images/img0.jpg').read_bytes() == (site / 'disk/img0.jpg').read_bytes()
    (site / 'key').write_text('secret')
    (site / 'disk/img1.jpg').unlink()
    (site / 'disk/img1.jpg').symlink_to('../key')
    for trusted in (False, True):
        with refused('prepare-problems') as caught:
            run(site, trust_sizes=trusted, overwrite=True)
        assert codes(caught.value.problems) == ['image-file-unknown']


def rename(*names: str):
    def change(data):
        for image, name in zip(data['images'], names, strict=True):
            image['file_name'] = name

    return change


def test_a_name_that_several_images_may_have_is_not_matched(site):
    with refused('prepare-problems') as caught:
        run(site, rename('cam1/img0.jpg', 'cam2/img0.jpg', 'img2.jpg'))
    others = [(p.code, p.facts['found'], p.facts['other']) for p in caught.value.problems]
    path = 'images/img0.jpg'
    assert others == [('coco-image-ambiguous', path, f'cam{k}/img0.jpg') for k in (2, 1)]
    _, data = run(site, skip_bad=True)
    assert [i['file_name'] for i in data['images']] == ['img2.jpg']
    # One of the two is there: the file without a folder may be the other one or not.
    (site / 'src/images/cam1').mkdir()
    (site / 'src/images/img1.jpg').rename(site / 'src/images/cam1/img0.jpg')
    summary, data = run(site, skip_bad=True, overwrite=True)
    assert [i['file_name'] for i in data['images']] == ['cam1/img0.jpg', 'img2.jpg']
    assert codes(summary.problems) == ['coco-image-ambiguous']
    # Folders in front that differ are no reason, as long as the rest tells.
    _, data = run(site, rename('/old/cam1/img0.jpg', '/old/img2.jpg', '/old/x/img0.jpg'), skip_bad=True, overwrite=True)
    assert [i['file_name'] for i in data['images']] == ['cam1/img0.jpg', 'img2.jpg']


@pytest.mark.parametrize('form', ['NFC', 'NFD'])
def test_accents_written_in_two_ways(site, form):
    other = {'NFC': 'NFD', 'NFD': 'NFC'}[form]
    (site / 'src/images/img0.jpg').rename(site / 'src/images' / unicodedata.normalize(other, 'Prüfung.jpg'))
    _, data = run(site, put('file_name', unicodedata.normalize(form, 'Prüfung.jpg'), 'images'))
    assert unicodedata.normalize(other, 'Prüfung.jpg') in [i['file_name'] for i in data['images']]
    assert (site / 'out/images' / unicodedata.normalize(other, 'Prüfung.jpg')).is_file()


def test_relative_coordinates_are_read_if_asked_for(site):
    def change(data):
        data['annotations'] = [a for a in data['annotations'] if isinstance(a['segmentation'], list)]
        for annotation in data['annotations']:
            for polygon in annotation['segmentation']:
                polygon[:] = [value / (W, H)[i % 2] for i, value in enumerate(polygon)]

    with refused('coco-files') as caught:
        run(site, change)
    assert codes(caught.value.problems) == ['coco-relative']
    _, data = run(site, relative=True)
    assert np.allclose(data['annotations'][0]['segmentation'], [TRIANGLE])
    assert np.allclose(data['annotations'][1]['segmentation'][1], SQUARE)


@pytest.mark.parametrize('images', [2, 3])
def test_labels_of_larger_pictures(site, images):
    def change(data):
        data['annotations'] = [a for a in data['annotations'] if isinstance(a['segmentation'], list)]
        for annotation in data['annotations']:
            if annotation['image_id'] < 10 + images:
                annotation['segmentation'] = [[1.8 * v for v in polygon] for polygon in annotation['segmentation']]

    if images == 2:
        run(site, change)
        return
    with refused('prepare-labels-larger', beyond=3, images=3):
        run(site, change)
    assert not (site / 'out').exists()


def test_crowd_regions_alone_are_objects_if_asked_for(site):
    def change(data):
        for annotation in data['annotations']:
            annotation['iscrowd'] = 1

    with refused('prepare-only-crowds', crowds=15):
        run(site, change)
    summary, data = run(site, crowd_as_objects=True)
    assert {a['iscrowd'] for a in data['annotations']} == {0}
    assert summary.splits['train'].objects == 15


def test_a_root_category_is_left_out(site):
    def change(data):
        data['categories'].insert(0, {'id': 0, 'name': 'animal', 'supercategory': 'none'})

    summary, data = run(site, change)
    assert [c['name'] for c in data['categories']] == ['cat', 'dog']
    assert [c['id'] for c in data['categories']] == [2, 7]
    assert summary.notes == [message('coco-root-category', names='animal')]

    def used(data):
        data['annotations'][0]['category_id'] = 0

    assert [c['name'] for c in run(site, used, overwrite=True)[1]['categories']] == ['animal', 'cat', 'dog']


@pytest.mark.parametrize(
    'json_at, images_at',
    [
        ('result.json', 'images'),
        ('result.json', '.'),
        ('_annotations.coco.json', '.'),
        ('annotations/instances_default.json', 'images/default'),
        ('annotations/a.json', 'JPEGImages'),
        ('train/_annotations.coco.json', 'train'),
        ('train/labels.json', 'train/images'),
        ('annotations/instances_train2017.json', 'train2017'),
        ('annotations/train.json', 'train'),
        ('annotations/x.json', 'annotations'),
    ],
)
def test_layouts(tmp_path, json_at, images_at):
    src = tmp_path / 'src'
    (src / json_at).parent.mkdir(parents=True)
    (src / json_at).write_text(json.dumps(dataset()))
    write_images(src / images_at, dataset())
    kind, reason = detect(src)
    assert kind == ('coco2017' if '2017' in json_at else 'coco') and Path(json_at).name in reason
    split = 'train' if 'train' in json_at else 'all'
    for given, out in ((src, 'a'), (src / json_at, 'b')):
        prepare(given, tmp_path / out, progress=False, workers=1)
        data = json.loads((tmp_path / out / f'annotations/instances_{split}.json').read_text())
        assert [i['file_name'] for i in data['images']] == ['img0.jpg', 'img1.jpg', 'img2.jpg']
        assert len(data['annotations']) == 15


def test_the_image_folder_may_be_named(site):
    elsewhere = site / 'elsewhere'
    (site / 'src/images').rename(elsewhere)
    with refused('coco-images-missing', path=LABEL_FILE, image='img0.jpg') as caught:
        run(site)
    assert '--image-root' in caught.value.hint
    _, data = run(site, image_root=elsewhere)
    assert len(data['images']) == 3 and (site / 'out/images/img2.jpg').is_file()


def two_splits(site: Path, change: Callable[[dict], None] | None = None) -> None:
    data = dataset()
    for image in data['images']:
        image['file_name'] = 'v' + image['file_name']
    if change:
        change(data)
    write_images(site / 'src/images', data)
    (site / 'src/annotations/instances_valid.json').write_text(json.dumps(data))


def test_classes_have_one_order_in_all_splits(site):
    def change(data):
        data['categories'] = [{'id': 2, 'name': 'dog'}, {'id': 7, 'name': 'cat'}, {'id': 9, 'name': 'bird'}]

    two_splits(site, change)
    summary, train = run(site)
    val = json.loads((site / 'out/annotations/instances_val.json').read_text())
    wanted = [{'id': 1, 'name': 'cat', 'supercategory': 'animal'}, {'id': 2, 'name': 'dog'}, {'id': 3, 'name': 'bird'}]
    assert train['categories'] == val['categories'] == wanted
    # The same ids mean other classes in the second file.
    assert [a['category_id'] for a in train['annotations'][:2]] == [1, 2]
    assert [a['category_id'] for a in val['annotations'][:2]] == [2, 1]
    assert summary.notes == [message('coco-categories-added', place=LABEL_FILE, names='bird')]


def test_an_image_in_two_splits_is_a_problem(site):
    def change(data):
        data['images'][0]['file_name'] = 'img1.jpg'

    two_splits(site, change)
    with refused('prepare-problems') as caught:
        run(site)
    assert caught.value.problems[0].facts['splits'] == 'train and in val'
    summary, _ = run(site, skip_bad=True)
    assert (summary.splits['train'].images, summary.splits['val'].images) == (3, 2)


def test_files_whose_splits_are_unclear_are_refused(site):
    text = (site / 'src/annotations/instances_train.json').read_text()
    (site / 'src/annotations/instances_train2.json').write_text(text)
    with refused('coco-several') as caught:
        run(site)
    assert caught.value.problems == [
        message('coco-of-split', split='train', files=LABEL_FILE),
        message('coco-of-split', split='no split', files='annotations/instances_train2.json'),
    ]
    (site / 'src/annotations/captions_train.json').write_text(text)
    (site / 'src/annotations/instances_train2.json').unlink()
    run(site)  # beside instances_*, other kinds of COCO's annotations are passed over


def test_classes_chosen_and_ordered(site):
    _, data = run(site, classes=['dog'])
    assert [c['name'] for c in data['categories']] == ['dog']
    assert {a['category_id'] for a in data['annotations']} == {7}
    summary, data = run(site, classes=['dog', 'cat'], overwrite=True)
    assert [(c['id'], c['name']) for c in data['categories']] == [(1, 'dog'), (2, 'cat')]
    assert [a['category_id'] for a in data['annotations'][:2]] == [2, 1]
    assert not summary.dropped
    summary, _ = run(site, classes=['cat'], overwrite=True)
    assert summary.dropped == {'of a class that --classes does not name': 6}
    with refused('prepare-classes') as caught:
        run(site, classes=['catt'], overwrite=True)
    assert caught.value.problems == [message('class-unknown', name='catt', near='; did you mean cat?')]


def test_min_area_spares_crowds(site):
    area = int(decoded(dataset()['annotations'][0]).sum())
    summary, data = run(site, min_area=area + 1)
    assert summary.dropped == {f'smaller than {area + 1} pixels': 3}
    assert len(data['annotations']) == 12


def test_sizes_may_be_trusted(site):
    for path in (site / 'src/images').iterdir():
        path.unlink()
    _, data = run(site, trust_sizes=True, placing='reference')
    assert [i['file_name'] for i in data['images']] == ['img0.jpg', 'img1.jpg', 'img2.jpg']
    assert data['images'][0]['width'] == W
    with refused('target-image', placing='link'):
        run(site, trust_sizes=True, overwrite=True)

    def no_size(data):
        del data['images'][1]['width'], data['images'][1]['height']

    for change in (put('width', 1 << 21, 'images'), no_size):
        with refused('prepare-problems') as caught:
            run(site, change, trust_sizes=True, overwrite=True)
    assert codes(caught.value.problems) == ['coco-size', 'coco-no-size']


def test_coco2017_has_a_layout_of_its_own(tmp_path):
    assert Coco2017Reader.detect(tmp_path) is None
    with refused('coco2017-missing', path=tmp_path):
        prepare(tmp_path, tmp_path.with_name('out_' + tmp_path.name), 'coco2017')
    for split in ('train', 'val'):
        data = dataset()
        for image in data['images']:
            image['file_name'] = f'{split}_{image["file_name"]}'
        write_images(tmp_path / f'src/{split}2017', data)
        path = tmp_path / f'src/annotations/instances_{split}2017.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data))
        path.with_name(f'captions_{split}2017.json').write_text('{"images": [')
    kind, reason = detect(tmp_path / 'src')
    assert kind == 'coco2017' and 'train2017/ and annotations/instances_val2017.json' in reason
    prepare(tmp_path / 'src', tmp_path / 'out', progress=False, workers=1)
    data = json.loads((tmp_path / 'out/annotations/instances_val.json').read_text())
    assert data['images'][0]['file_name'] == 'val2017/val_img0.jpg'
    assert [i['id'] for i in data['images']] == [10, 11, 12]


def test_a_source_goes_to_worker_processes(site):
    source = CocoReader.open(site / 'src', {'progress': False})
    items = source.items()
    again = pickle.loads(pickle.dumps(source))
    assert again.read(items[1]) == source.read(items[1])
    assert len(source.read(items[1]).instances) == 5


def test_damaged_files_are_of_no_format(tmp_path):
    for name, data in (('a.json', b'\xff\xfe'), ('b.json', b''), ('c.json', b'{"images": [')):
        (tmp_path / name).write_bytes(data)
    (tmp_path / 'd.json').mkdir()
    for root in (tmp_path, tmp_path / 'none'):
        with refused('format-unknown'):
            detect(root)


def test_real_coco_masks_stay_the_same(real_data, tmp_path):
    src = real_data / 'coco2017_real'
    summary = prepare(src, tmp_path / 'out', progress=False, placing='reference')
    assert summary.format == 'coco2017' and not summary.dropped and not summary.notes
    count = 0
    for split in ('train', 'val'):
        old = COCO(str(src / f'annotations/instances_{split}2017.json'))
        new = COCO(str(tmp_path / f'out/annotations/instances_{split}.json'))
        assert sorted(old.imgs) == sorted(new.imgs) and old.cats == new.cats
        for image in old.imgs:
            for a, b in zip(old.imgToAnns[image], new.imgToAnns[image], strict=True):
                mask = new.annToMask(b)
                assert (old.annToMask(a) == mask).all()
                assert (a['category_id'], a['iscrowd']) == (b['category_id'], b['iscrowd'])
                assert b['area'] == mask.sum()
                ys, xs = np.nonzero(mask)
                assert b['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                count += 1
    assert count == 909


def test_what_cannot_be_written_again_is_left_out(site):
    """Half characters, depths and numbers of any length, wherever nobody needs them."""
    deep: list = []
    for _ in range(600):
        deep = [deep]

    def change(data):
        data['info']['description'] = '\ud800'
        data['licenses'].append(math.nan)
        data['images'][0]['photographer'] = deep
        data['images'][1]['photographer'] = '\ud800'
        data['categories'][0]['supercategory'] = 'a\ud800'
        data['annotations'][0]['id'] = '9' * 5000

    _, coco = run(site, change)
    assert coco['licenses'] == [] and 'supercategory' not in coco['categories'][0]
    assert [set(image) for image in coco['images']][2] >= {'id', 'file_name', 'license'}
    assert len(coco['annotations']) == 15


@pytest.mark.parametrize('key', ['image_id', 'category_id'])
def test_ids_of_thousands_of_digits(site, key):
    with refused('prepare-problems'):
        run(site, lambda d: d['annotations'][0].update({key: '9' * 5000}))
