"""Every fault planted in a clean data set is found, and only that; the clean one gives nothing."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from pycocotools import mask as mask_api

from mmfinetune.data import coco_json, demo
from mmfinetune.data.check import cache, repair, run
from mmfinetune.data.check.findings import Report
from mmfinetune.data.check.images import look_at, similar
from mmfinetune.data.check.kinds import KINDS
from mmfinetune.data.check.run import Options, check
from mmfinetune.data.check.shapes import clip, turn_mask, turn_polygons
from mmfinetune.utils.masks import run_lengths
from tests.builders import voc
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import codes, refused

PLAIN = Options(cache=False, workers=1)


@dataclass
class Site:
    """A prepared folder in memory: change `data`, then `check`."""

    root: Path
    data: dict[str, dict]

    def path(self, split: str) -> Path:
        return self.root / 'annotations' / f'instances_{split}.json'

    def save(self) -> dict[str, tuple[Path, Path]]:
        for split, data in self.data.items():
            self.path(split).parent.mkdir(parents=True, exist_ok=True)
            self.path(split).write_text(json.dumps(data))
        return {split: (self.path(split), self.root / 'images') for split in self.data}

    def check(self, classes=None, **options) -> Report:
        return check(self.save(), classes, replace(PLAIN, **options))

    def image(self, split: str, row: int) -> Path:
        """An image file that may be changed: it is a link to the clean set's until then."""
        return self.root / 'images' / self.data[split]['images'][row]['file_name']

    def redraw(self, split: str, row: int, image: Image.Image, **options) -> None:
        path = self.image(split, row)
        path.unlink()
        image.save(path, **options)


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Site:
    """Enough images that no class is rare."""
    folder = tmp_path_factory.mktemp('clean')
    devkit = demo.make_voc(folder, 240, 60, progress=False)
    voc.convert(devkit, devkit / 'annotations', workers=1, progress=False)
    data = {split: json.loads(path.read_text()) for split, path in voc.annotation_paths(devkit / 'annotations').items()}
    return Site(devkit, data)


@pytest.fixture
def site(clean, tmp_path) -> Site:
    root = tmp_path / 'site'
    (root / 'images' / 'JPEGImages').mkdir(parents=True)
    for path in (clean.root / 'JPEGImages').iterdir():
        os.link(path, root / 'images' / 'JPEGImages' / path.name)
    return Site(root, copy.deepcopy(clean.data))


def polygon(data: dict, points: list[float], **changes: object) -> dict:
    """Turn the first annotation into a polygon with the right box and area."""
    entry, size = data['annotations'][0], data['images'][0]
    rle = mask_api.merge(mask_api.frPyObjects([points], size['height'], size['width']))
    x, y = np.reshape(points, (-1, 2)).T
    entry.update(
        {
            'segmentation': [points],
            'area': float(mask_api.area(rle)),
            'bbox': [float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y))],
            **changes,
        }
    )
    return entry


def to_boxes(site: Site) -> None:
    for entry in site.data['train']['annotations']:
        x, y, w, h = entry['bbox']
        entry.update(segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], area=w * h)


def train(site: Site) -> dict:
    return site.data['train']


def first(site: Site) -> dict:
    return train(site)['annotations'][0]


def again(site: Site, **changes: object) -> None:
    train(site)['annotations'].append({**first(site), 'id': 10**6, **changes})


def shifted(site: Site) -> None:
    """An object drawn twice, the second time a pixel off."""
    entry = polygon(train(site), [50, 50, 120, 55, 125, 110, 80, 140, 45, 100])
    moved = [value + 0.5 for value in entry['segmentation'][0]]
    again(site, segmentation=[moved], bbox=[v + 0.5 if k < 2 else v for k, v in enumerate(entry['bbox'])])


def remove_class(site: Site, split: str, name: str) -> None:
    data = site.data[split]
    number = next(c['id'] for c in data['categories'] if c['name'] == name)
    data['annotations'] = [a for a in data['annotations'] if a['category_id'] != number]


def thin_out(site: Site, split: str, name: str, keep: int) -> None:
    data = site.data[split]
    number = next(c['id'] for c in data['categories'] if c['name'] == name)
    chosen = [a for a in data['annotations'] if a['category_id'] == number]
    data['annotations'] = [a for a in data['annotations'] if a not in chosen[keep:]]


def only_class(site: Site, name: str, times: int) -> None:
    """The objects of a class, many times over on images of their own."""
    data = train(site)
    number = next(c['id'] for c in data['categories'] if c['name'] == name)
    chosen = [a for a in data['annotations'] if a['category_id'] == number]
    data['annotations'] += [
        {**a, 'id': 10**6 + k * 1000 + i, 'image_id': 10**6 + k * 1000 + i}
        for k in range(times)
        for i, a in enumerate(chosen)
    ]
    data['images'] += [
        {**data['images'][0], 'id': 10**6 + k * 1000 + i, 'file_name': f'more/{k}_{i}.jpg'}
        for k in range(times)
        for i in range(len(chosen))
    ]


def reverse_categories(site: Site, split: str) -> None:
    site.data[split]['categories'].reverse()


def copy_image(site: Site, change: Callable[[Image.Image], Image.Image] | None) -> None:
    """The first training image is also the first of val."""
    if change is None:
        source, target = site.image('train', 0), site.image('val', 0)
        target.unlink()
        shutil.copy(source, target)
        return
    with Image.open(site.image('train', 0)) as image:
        site.redraw('val', 0, change(image.convert('RGB')), quality=70)


BOW_TIE = [50, 50, 120, 120, 120, 50, 50, 120]

# Code, how to plant it, other codes that are true of it too.
PLANTED: list[tuple[str, Callable[[Site], object], set[str]]] = [
    ('annotation-id-zero', lambda s: first(s).update(id=0), set()),
    ('annotation-id-duplicate', lambda s: first(s).update(id=2), set()),
    ('annotation-id-type', lambda s: first(s).update(id='one'), set()),
    (
        'image-id-type',
        lambda s: train(s)['images'].append({**train(s)['images'][0], 'id': 'x', 'file_name': 'y.jpg'}),
        {'image-empty'},
    ),
    ('image-id-unknown', lambda s: first(s).update(image_id=10**9), set()),
    ('category-id-unknown', lambda s: first(s).update(category_id=99), set()),
    (
        'category-name-duplicate',
        lambda s: [d['categories'].append({'id': 21, 'name': 'cat'}) for d in s.data.values()],
        set(),
    ),
    ('class-order', lambda s: reverse_categories(s, 'val'), set()),
    ('background-class', lambda s: [d['categories'][0].update(name='background') for d in s.data.values()], set()),
    ('class-absent', lambda s: remove_class(s, 'train', 'cat'), {'image-empty'}),
    ('class-unmeasured', lambda s: remove_class(s, 'val', 'cat'), set()),
    ('class-rare', lambda s: thin_out(s, 'train', 'cat', 4), {'image-empty'}),
    ('class-imbalance', lambda s: only_class(s, 'cat', 120), set()),
    (
        'image-listed-twice',
        lambda s: train(s)['images'].append({**train(s)['images'][0], 'id': 10**6}),
        {'image-empty'},
    ),
    (
        'image-empty',
        lambda s: train(s)['images'].append({**train(s)['images'][0], 'id': 10**6, 'file_name': 'new.jpg'}),
        set(),
    ),
    ('file-name-outside', lambda s: train(s)['images'][0].update(file_name='../x/1.jpg'), set()),
    ('image-size-invalid', lambda s: train(s)['images'][0].update(width=None), set()),
    ('box-invalid', lambda s: first(s).update(bbox=[1, 2, 3]), set()),
    ('box-degenerate', lambda s: first(s).update(bbox=[10, 10, 0, 9]), set()),
    ('box-tiny', lambda s: polygon(train(s), [50, 50, 50.9, 50, 50.9, 70, 50, 70], area=18), set()),
    ('box-outside', lambda s: first(s).update(bbox=[900, 10, 9, 9]), {'box-mask'}),
    ('box-over-edge', lambda s: first(s).update(bbox=[200, 10, 90, 90]), {'box-mask'}),
    ('box-mask', lambda s: first(s)['bbox'].__setitem__(0, first(s)['bbox'][0] + 4), set()),
    ('area-invalid', lambda s: first(s).pop('area'), set()),
    ('area-zero', lambda s: first(s).update(area=0), set()),
    ('area-mismatch', lambda s: first(s).update(area=first(s)['area'] * 1.3), set()),
    ('iscrowd-missing', lambda s: first(s).pop('iscrowd'), set()),
    ('iscrowd-value', lambda s: first(s).update(iscrowd=2), set()),
    ('crowd-polygon', lambda s: polygon(train(s), [50, 50, 120, 55, 80, 140], iscrowd=1), set()),
    ('mask-missing', lambda s: first(s).update(segmentation=None), set()),
    ('mask-type', lambda s: first(s).update(segmentation='x'), set()),
    ('mask-tiny', lambda s: polygon(train(s), [50, 50, 52, 50, 52, 53, 50, 53]), set()),
    ('mask-empty', lambda s: polygon(train(s), [50, 50, 90, 50, 70, 50], bbox=[50, 50, 40, 1], area=3), set()),
    ('polygon-points', lambda s: first(s).update(segmentation=[[50, 50, 90, 90]]), set()),
    ('polygon-odd', lambda s: first(s).update(segmentation=[[50, 50, 90, 90, 50, 90, 1]]), set()),
    ('polygon-number', lambda s: first(s).update(segmentation=[[50, 50, float('nan'), 90, 50, 90]]), set()),
    ('polygon-far', lambda s: polygon(train(s), [50, 50, 900, 60, 60, 90], bbox=[50, 50, 174, 40]), set()),
    ('polygon-over-edge', lambda s: polygon(train(s), [180, 50, 240, 60, 190, 90], bbox=[180, 50, 44, 40]), set()),
    ('polygon-crossing', lambda s: polygon(train(s), BOW_TIE), set()),
    ('rle-size', lambda s: first(s)['segmentation'].update(size=[9, 9]), set()),
    ('rle-counts', lambda s: first(s)['segmentation'].update(counts='12'), set()),
    ('rectangle-masks', to_boxes, set()),
    ('object-duplicate', again, set()),
    ('object-duplicate', shifted, set()),
    ('no-objects', lambda s: [a.update(iscrowd=1) for a in train(s)['annotations']], set()),
    ('entry-type', lambda s: train(s)['annotations'].append(5), set()),
    ('leak-content', lambda s: train(s)['images'][0].update(file_name=s.data['val']['images'][0]['file_name']), set()),
]
IN_IMAGES: list[tuple[str, Callable[[Site], object], set[str]]] = [
    ('image-missing', lambda s: s.image('train', 3).unlink(), set()),
    ('image-truncated', lambda s: cut(s.image('train', 3)), set()),
    ('image-unreadable', lambda s: overwrite(s.image('train', 3), b'no image'), set()),
    ('image-size', lambda s: s.redraw('train', 3, Image.new('RGB', (50, 224))), set()),
    ('image-exif-same-size', lambda s: s.redraw('train', 3, noise(224, 224), exif=exif(6)), set()),
    ('image-duplicate', lambda s: overwrite(s.image('train', 3), s.image('train', 4).read_bytes()), set()),
    ('leak-content', lambda s: copy_image(s, None), set()),
    ('leak-similar', lambda s: copy_image(s, lambda image: image), set()),
    ('leak-similar', lambda s: copy_image(s, lambda i: ImageEnhance.Brightness(i).enhance(1.02)), set()),
]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def overwrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def cut(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-500])


def test_clean_set_gives_nothing(clean):
    splits = {split: (path, clean.root) for split, path in voc.annotation_paths(clean.root / 'annotations').items()}
    report = check(splits, None, PLAIN)
    assert report.findings == []
    assert [(s.images, s.annotations) for s in report.splits] == [(240, 711), (60, 182)]
    assert sum(report.splits[0].per_class.values()) == 711
    assert sum(report.splits[0].per_image.values()) == 240
    assert report.splits[0].sizes == {'224x224': 240}


@pytest.mark.parametrize(('code', 'plant', 'others'), PLANTED, ids=[f'{k}-{row[0]}' for k, row in enumerate(PLANTED)])
def test_planted_fault_is_found(site, code, plant, others):
    plant(site)
    report = site.check(images=False)
    assert report.codes() - others == {code}
    assert all(f.count == 1 for f in report.findings if f.code == code) or code in (
        'rectangle-masks',
        'category-name-duplicate',
        'background-class',
        'class-imbalance',
    )


@pytest.mark.parametrize(
    ('code', 'plant', 'others'), IN_IMAGES, ids=[f'{k}-{row[0]}' for k, row in enumerate(IN_IMAGES)]
)
def test_fault_planted_in_an_image_is_found(site, code, plant, others):
    plant(site)
    report = site.check(workers=2)
    assert report.codes() - others == {code}
    assert [f.count for f in report.findings] == [1]
    assert report.findings[0].examples[0].file.startswith('JPEGImages/')


def test_every_code_is_planted_somewhere():
    from tests.data.formats.test_malformed import ENTRIES, FILES, IMAGES

    planted = {row[0] for row in PLANTED + IN_IMAGES} | {r[2] for r in FILES + ENTRIES + IMAGES}
    elsewhere = {'labels-larger', 'labels-relative', 'image-pipeline', 'section-repeated'}  # below, and with a config
    assert set(KINDS) - planted - elsewhere <= {'no-file', 'file-unreadable'}


def scaled_labels(site: Site, factor: float, images: int) -> None:
    """Rectangles of 0.5 to 0.9 of each image, multiplied in the first training images."""
    for data in site.data.values():
        place = {image['id']: k for k, image in enumerate(data['images'])}
        for entry in data['annotations']:
            low, high = (224 * part * (factor if place[entry['image_id']] < images else 1) for part in (0.5, 0.9))
            outline = [low, low, high, low, high, high, low, high, low, (low + high) / 2]
            side = high - low
            entry.update(segmentation=[outline], bbox=[low, low, side, side], area=side * side)


@pytest.mark.parametrize(('images', 'found'), [(240, True), (200, True), (150, False), (2, False)])
def test_labels_of_larger_pictures(site, tmp_path, images, found):
    scaled_labels(site, 1.5, images)
    codes = {f.code for f in site.check(images=False).findings if f.split == 'train'}
    assert ('labels-larger' in codes) == found
    assert 'polygon-over-edge' in codes
    if images == 240:
        with refused('fix-by-hand'):
            repair.fix(site.save(), tmp_path / 'out', None, PLAIN)


def test_relative_labels(site, tmp_path):
    scaled_labels(site, 1 / 224, 10**6)
    report = site.check(images=False)
    assert {f.split for f in report.of('error') if f.code == 'labels-relative'} == {'train', 'val'}
    with refused('fix-by-hand'):
        repair.fix(site.save(), tmp_path / 'out', None, PLAIN)


@pytest.mark.parametrize('size', [[65536, 65536], [224, 224]])
def test_a_run_of_more_than_32_bits_is_a_finding(site, size):
    first(site)['segmentation'] = {'size': size, 'counts': [2**32]}
    if size[0] > 224:
        for key in ('width', 'height'):
            del train(site)['images'][first(site)['image_id'] - 1][key]
    report = site.check(images=False)
    assert 'rle-counts' in report.codes()


def test_a_section_that_stands_twice_is_a_finding(site):
    splits = site.save()
    path = splits['train'][0]
    path.write_text('{"annotations": [], ' + path.read_text().lstrip()[1:])
    report = check(splits, None, PLAIN)
    assert 'section-repeated' in report.codes() and not report.good


def test_each_fault_of_a_whole_file_is_a_kind():
    text = Path(coco_json.__file__).read_text()
    found = re.findall(r"(?:Problem|Message)\('coco-([a-z-]+)'", text)
    assert len(found) > 8 and set(found) <= KINDS.keys()


def test_order_of_the_config_is_expected_of_all_splits(site):
    names = [c['name'] for c in train(site)['categories']]
    assert site.check(names, images=False).good
    report = site.check(names[::-1], images=False)
    assert [f.split for f in report.findings] == ['train', 'val']
    assert report.codes() == {'class-order'}
    with refused('check-errors', count=2) as caught:
        report.require_good()
    assert codes(caught.value.problems) == ['class-order'] * 2


def test_split_used_twice_is_checked_once(site):
    splits = site.save()
    report = check({**splits, 'test': splits['val']}, None, PLAIN)
    assert [s.name for s in report.splits] == ['train', 'val, test']
    assert report.findings == []


def test_lines_name_the_place_and_are_few(site):
    for row, entry in enumerate(train(site)['annotations'][:9]):
        entry['area'] *= 2 + row
    first(site)['iscrowd'] = 7
    lines = site.check(images=False).lines(1)
    assert len(lines) == 2
    assert lines[0].startswith('error: train: 1 annotation whose iscrowd is not 0 or 1')
    assert 'JPEGImages/' in lines[0]
    assert '#1: iscrowd 7' in lines[0]
    assert lines[1] == '… and 1 more kinds of errors and warnings'


def test_the_worst_places_are_shown(site):
    for row, entry in enumerate(train(site)['annotations'][:9]):
        entry['area'] *= 2 + row
    (finding,) = site.check(images=False, max_examples=2).findings
    assert finding.count == 9
    assert [e.annotation for e in finding.examples] == [9, 8]


def test_images_of_one_subject_are_no_leak(site):
    # Two frames of one scene share their layout, not their pixels.
    with Image.open(site.image('train', 0)) as image:
        site.redraw('val', 0, ImageOps.mirror(image))
    assert site.check().findings == []


def test_flat_images_are_not_alike(tmp_path):
    facts = []
    for k, colour in enumerate(('white', 'black')):
        Image.new('RGB', (64, 64), colour).save(tmp_path / f'{k}.png')
        facts.append({tmp_path / f'{k}.png': look_at(tmp_path / f'{k}.png')})
    assert similar(*facts) == []


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    strings, totals, areas = [], [], []
    for size in rng.integers(1, 90, (200, 2)):
        mask = (rng.random(size) < rng.choice([0, 0.01, 0.5, 0.99, 1])).astype(np.uint8)
        if rng.random() < 0.3:
            mask = np.kron(mask, np.ones((17, 23), np.uint8))
        rle = mask_api.encode(np.asfortranarray(mask))
        strings.append(rle['counts'])
        totals.append(mask.size)
        areas.append(int(mask_api.area(rle)))
    found = run_lengths(strings)
    assert found[0].tolist() == totals
    assert found[1].tolist() == areas


# The cache


def test_second_check_comes_from_the_cache(site, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    cut(site.image('train', 3))
    one = site.check(cache=True)
    splits = site.save()
    monkeypatch.setattr(run, 'examine', None)
    two = check(splits, None, replace(PLAIN, cache=True))
    assert (one.cached, two.cached) == (False, True)
    assert two.findings == one.findings
    assert two.splits == one.splits
    assert not two.good


@pytest.mark.parametrize('change', ['annotations', 'an image', 'a new image', 'options', 'classes'])
def test_what_changes_is_checked_anew(site, tmp_path, monkeypatch, change):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    path = site.image('train', 3)
    content = path.read_bytes()
    if change == 'a new image':
        path.unlink()
    site.check(cache=True)
    options, classes = {}, None
    if change == 'annotations':
        first(site)['iscrowd'] = 2
    elif change == 'an image':
        overwrite(path, content[:-1] + b'x')
    elif change == 'a new image':
        path.write_bytes(content)
    elif change == 'options':
        options = {'images': False}
    else:
        classes = ['cat']
    assert not site.check(classes, cache=True, **options).cached


def test_same_content_with_a_new_time_is_known(site, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    assert not site.check(cache=True).cached
    os.utime(site.path('train'), (1, 1))
    assert check({s: (site.path(s), site.root / 'images') for s in site.data}, None, replace(PLAIN, cache=True)).cached


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'null', b'{"stamp": 1}', b'[' * 100_000, b'\xff'])
def test_damaged_cache_is_ignored(site, tmp_path, monkeypatch, content):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    site.check(cache=True)
    files = [p for p in cache.cache_folder().rglob('*') if p.is_file()]
    assert len(files) == 3
    for file in files:
        file.write_bytes(content)
    report = site.check(cache=True)
    assert not report.cached
    assert report.good
    assert site.check(cache=True).cached


def test_cache_that_cannot_be_written_is_done_without(site, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert site.check(cache=True).good
    assert not site.check(cache=True).cached


# Repairs


def plant_all(site: Site) -> None:
    """Every fault that can be repaired, each on an annotation or image of its own."""
    entries = [e for e in train(site)['annotations'] if e['image_id'] > 20]
    shape = [[50.0, 50.0, 120.0, 55.0, 125.0, 110.0, 80.0, 140.0, 45.0, 100.0]]
    good = {'bbox': [45.0, 50.0, 80.0, 90.0], 'area': 5000.0}
    changes = [
        {'id': 0},
        {'id': 5},
        {'id': 'x'},
        {'iscrowd': True},
        {'iscrowd': None},
        {'image_id': -7},
        {'category_id': 99},
        {'bbox': None},
        {'bbox': [1, 2, 0, 0]},
        {'bbox': [1, 1, 500, 500]},
        {'area': None},
        {'area': 0},
        {'segmentation': None},
        {'segmentation': 'x'},
        {'segmentation': shape[0], **good},
        {'segmentation': [*shape, [1, 2, 3, 4]], **good},
        {'segmentation': [*shape, [1, 2, 3, 4, 5, 6, 7]], **good},
        {'segmentation': [*shape, [1, float('nan'), 3, 4, 5, 6]], **good},
        {'segmentation': [[50, 50, 9000, 60, 60, 90]]},
        {'segmentation': [[180, 50, 240, 60, 190, 90]]},
        {'segmentation': [[50, 50, 90, 50, 70, 50]]},
        {'segmentation': {'size': [9, 9], 'counts': '12'}},
        {'segmentation': {'size': [224, 224], 'counts': '12'}},
    ]
    for entry, change in zip(entries[::3], changes, strict=False):
        entry.update(change)
    assert len(entries[::3]) > len(changes)
    entries[-1].pop('iscrowd')
    train(site)['annotations'].append('text')
    train(site)['images'][2]['width'] = None
    train(site)['images'][3]['file_name'] = 'JPEGImages/nowhere.jpg'
    cut(site.image('train', 4))
    site.redraw('train', 5, noise(100, 50))
    site.data['val']['images'][0]['id'] = 'first'
    for entry in site.data['val']['annotations']:
        if entry['image_id'] == 1:
            entry['image_id'] = 'first'
    reverse_categories(site, 'val')


def test_repaired_copy_has_no_errors(site, tmp_path):
    plant_all(site)
    splits = site.save()
    before = {split: site.path(split).read_bytes() for split in splits}
    report = check(splits, None, PLAIN)
    assert len(report.of('error')) >= 20
    fixed = repair.fix(splits, tmp_path / 'out', None, PLAIN)
    assert fixed.report.good
    assert {f.code for f in fixed.report.findings} <= {'class-rare', 'image-empty'}
    assert {split: site.path(split).read_bytes() for split in splits} == before
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['annotations', 'changes.json', 'images']
    changes = json.loads((tmp_path / 'out' / 'changes.json').read_text())
    assert changes == fixed.changes
    done = json.loads(fixed.paths['train'].read_text())
    # Three images are lost; no object but those of which nothing could be saved.
    assert len(done['images']) == 237
    dropped = [c for c in changes if c['change'].startswith('object dropped')]
    assert len(done['annotations']) == 711 - (len(dropped) - 1)
    assert [a['id'] for a in done['annotations']] == list(range(1, len(done['annotations']) + 1))
    assert [c['name'] for c in done['categories']] == [
        c['name'] for c in json.loads(fixed.paths['val'].read_text())['categories']
    ]


def test_repair_leaves_what_is_good_untouched(site, tmp_path):
    first(site)['bbox'] = [0, 0, 3, 3]
    splits = site.save()
    fixed = repair.fix(splits, tmp_path / 'out', None, PLAIN)
    done = json.loads(fixed.paths['train'].read_text())
    assert [c['change'] for c in fixed.changes] == ['bbox made from the mask']
    assert (
        done['annotations'][0]['bbox']
        == mask_api.toBbox(
            {**first(site)['segmentation'], 'counts': first(site)['segmentation']['counts'].encode()}
        ).tolist()
    )
    assert done['annotations'][1:] == train(site)['annotations'][1:]
    assert done['images'] == train(site)['images']
    assert json.loads(fixed.paths['val'].read_text()) == site.data['val']
    assert '1 x bbox made from the mask' in fixed.text()


def test_repair_of_two_image_folders(site, tmp_path):
    first(site)['id'] = 0
    splits = site.save()
    other = tmp_path / 'other'
    shutil.copytree(site.root / 'images', other)
    fixed = repair.fix({'train': splits['train'], 'val': (splits['val'][0], other)}, tmp_path / 'out', None, PLAIN)
    names = [json.loads(fixed.paths[s].read_text())['images'][0]['file_name'] for s in ('train', 'val')]
    assert [name.split('/')[0] for name in names] == ['images', 'other']
    assert all((tmp_path / 'out' / 'images' / name).is_file() for name in names)
    assert fixed.report.good


@pytest.mark.parametrize(
    ('spoil', 'code'),
    [
        ('not JSON', 'fix-by-hand'),
        ('section twice', 'fix-by-hand'),
        ('nothing left', 'fix-nothing-left'),
        ('already exists', 'fix-exists'),
    ],
)
def test_what_cannot_be_repaired_writes_nothing(site, tmp_path, spoil, code):
    if spoil == 'nothing left':
        for entry in train(site)['annotations']:
            entry['segmentation'] = []
    splits = site.save()
    if spoil == 'not JSON':
        site.path('val').write_text('{"images": [')
    elif spoil == 'section twice':
        site.path('val').write_text('{"images": [], ' + site.path('val').read_text().lstrip()[1:])
    elif spoil == 'already exists':
        (tmp_path / 'out').mkdir()
        (tmp_path / 'out' / 'mine.txt').write_text('')
    before = sorted(tmp_path.rglob('*'))
    with refused(code):
        repair.fix(splits, tmp_path / 'out', None, PLAIN)
    assert sorted(tmp_path.rglob('*')) == before


def test_two_classes_of_one_id_are_for_a_person(site, tmp_path):
    train(site)['categories'][0]['id'] = 2
    with refused('fix-category-id', first='aeroplane', second='bicycle'):
        repair.fix(site.save(), tmp_path / 'out', None, PLAIN)


def test_classes_of_one_file_only_are_for_a_person_or_a_config(site, tmp_path):
    names = [c['name'] for c in train(site)['categories']]
    site.data['val']['categories'][7]['name'] = 'tomcat'
    splits = site.save()
    with refused('fix-classes', path=site.path('val')) as caught:
        repair.fix(splits, tmp_path / 'out', None, PLAIN)
    assert caught.value.problems == ['tomcat']
    fixed = repair.fix(splits, tmp_path / 'out', names, PLAIN)
    assert {c['change'] for c in fixed.changes} == {
        'categories put into the expected order',
        'object dropped: its class is not expected',
    }
    assert fixed.report.good


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_turned_masks_fit_the_turned_image(orientation):
    width, height = 60, 40
    shape = [[10.0, 5.0, 50.0, 8.0, 45.0, 20.0, 12.0, 30.0]]
    mask = mask_api.decode(mask_api.merge(mask_api.frPyObjects(shape, height, width)))
    image = Image.fromarray(mask * 255)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image)) > 0
    assert (turn_mask(mask, orientation) == expected).all()
    polygons = turn_polygons(shape, orientation, width, height)
    drawn = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, width, height)))
    # pycocotools rounds coordinates to one side, so borders differ by a pixel.
    both = (drawn & expected).sum() / (drawn | expected).sum()
    assert both > 0.93


@pytest.mark.parametrize('drawn_upright', [False, True])
def test_exif_is_repaired_by_where_the_masks_are(site, tmp_path, drawn_upright):
    # Stored 300x200, turned to 200x300 when it is read; the file has the stored size.
    site.redraw('train', 0, noise(300, 200), exif=exif(6))
    image = train(site)['images'][0]
    image.update(width=300, height=200)
    shape = [20.0, 210.0, 90.0, 215.0, 80.0, 290.0] if drawn_upright else [210.0, 20.0, 215.0, 90.0, 290.0, 80.0]
    kept = polygon(train(site), shape)
    if drawn_upright:
        kept['area'] = 2600.0
    train(site)['annotations'] = [a for a in train(site)['annotations'] if a['image_id'] != image['id'] or a is kept]
    assert 'image-exif' in site.check().codes()
    fixed = repair.fix(site.save(), tmp_path / 'out', None, PLAIN)
    done = json.loads(fixed.paths['train'].read_text())
    assert (done['images'][0]['width'], done['images'][0]['height']) == (200, 300)
    x, y = np.reshape(done['annotations'][0]['segmentation'], (-1, 2)).T
    if drawn_upright:
        assert done['annotations'][0]['segmentation'] == [shape]
    else:
        assert (x.tolist(), y.tolist()) == ([180.0, 110.0, 120.0], [210.0, 215.0, 290.0])
    assert fixed.report.good


def turned(site: Site, row: int, shape: list[float]) -> None:
    """Make a training image one that EXIF turns from 300x200, with one object."""
    site.redraw('train', row, noise(300, 200), exif=exif(6))
    data, image = train(site), train(site)['images'][row]
    image.update(width=300, height=200)
    kept = next(a for a in data['annotations'] if a['image_id'] == image['id'])
    x, y = np.reshape(shape, (-1, 2)).T
    kept.update(segmentation=[shape], bbox=[float(v) for v in (x.min(), y.min(), np.ptp(x), np.ptp(y))], area=3200.0)
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] != image['id'] or a is kept]


def test_exif_is_not_repaired_by_a_guess(site, tmp_path):
    inside = [20.0, 20.0, 100.0, 20.0, 100.0, 100.0]
    turned(site, 0, inside)
    with refused('fix-exif') as caught:
        repair.fix(site.save(), tmp_path / 'out', None, PLAIN)
    assert caught.value.problems == [train(site)['images'][0]['file_name']]
    assert not (tmp_path / 'out').exists()
    (finding,) = [f for f in site.check().findings if f.code == 'image-exif']
    assert finding.examples[0].shape == [inside]  # what --html shows
    masks = {}
    for answer in ('upright', 'stored'):
        fixed = repair.fix(site.save(), tmp_path / answer, None, replace(PLAIN, exif_masks=answer))
        done = json.loads(fixed.paths['train'].read_text())
        assert (done['images'][0]['width'], done['images'][0]['height']) == (200, 300)
        masks[answer] = next(a for a in done['annotations'] if a['image_id'] == done['images'][0]['id'])['segmentation']
    assert masks == {'upright': [inside], 'stored': turn_polygons([inside], 6, 300, 200)}
    # Masks of one file are of one kind: one that leaves a picture tells for all, and is believed for its own.
    turned(site, 1, [20.0, 210.0, 100.0, 210.0, 100.0, 290.0])
    for number, options in enumerate((PLAIN, replace(PLAIN, exif_masks='upright'))):
        fixed = repair.fix(site.save(), tmp_path / str(number), None, options)
        done = json.loads(fixed.paths['train'].read_text())['annotations']
        assert next(a for a in done if a['image_id'] == train(site)['images'][0]['id'])['segmentation'] == [inside]


def test_clip_keeps_holes():
    # A frame drawn as one ring with a slit, half of it outside.
    frame = [-20, 10, 40, 10, 40, 70, -20, 70, -20, 10, -5, 25, -5, 55, 25, 55, 25, 25, -5, 25]
    clipped = clip([[float(v) for v in frame]], 100, 100)
    area = mask_api.area(mask_api.merge(mask_api.frPyObjects(clipped, 100, 100)))
    assert area == pytest.approx(40 * 60 - 25 * 30, rel=0.02)
    assert min(v for part in clipped for v in part) >= 0


# Real data


@pytest.mark.parametrize('split', ['train', 'val'])
def test_real_coco_has_no_error_and_no_warning_but_classes(real_data, split):
    root = real_data / 'coco2017_real'
    report = check({split: (root / f'annotations/instances_{split}2017.json', root / f'{split}2017')}, None, PLAIN)
    assert report.good
    assert {f.code for f in report.of('warning')} <= {'class-absent'}


def test_real_voc_has_no_error_and_no_warning_but_classes(real_data, tmp_path):
    devkit = real_data / 'voc2012_real/VOCdevkit/VOC2012'
    voc.convert(devkit, tmp_path, workers=1, progress=False)
    report = check({s: (p, devkit) for s, p in voc.annotation_paths(tmp_path).items()}, None, PLAIN)
    assert report.good
    assert {f.code for f in report.of('warning')} <= {'class-absent'}


@pytest.mark.parametrize('kind', STRANGE)
def test_what_is_no_file_is_a_finding(site, kind):
    name = train(site)['images'][2]['file_name']
    strange(site.image('train', 2), kind)
    (finding,) = [f for f in site.check().findings if f.severity == 'error']
    assert (finding.code, finding.examples[0].file) == ('image-unreadable', name)
    splits = site.save()
    strange(splits['val'][0], kind)
    assert {f.code for f in check(splits, None, Options(workers=1)).of('error')} == {
        'image-unreadable',
        'file-unreadable',
    }


def test_a_missing_image_of_the_same_look_is_told(site):
    path = site.image('train', 0)
    path.rename(path.with_name('Pru\u0308fung.jpg'))
    train(site)['images'][0]['file_name'] = 'JPEGImages/Prüfung.jpg'
    (finding,) = site.check().findings
    assert finding.code == 'image-missing'
    assert 'NFD' in finding.examples[0].detail
