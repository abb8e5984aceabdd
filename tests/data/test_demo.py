from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mmfinetune.data import demo
from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.data.preflight import read_split
from tests.builders import voc
from tests.builders.classes import COCO_CLASSES, coco_name

TRAIN, VAL = 6, 4


def digests(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob('*'))
        if p.is_file()
    }


def make_voc(root: Path, num_train: int = TRAIN, seed: int = 0) -> Path:
    return demo.make_voc(root, num_train, VAL, seed, progress=False)


@pytest.fixture(scope='module')
def devkit(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp('demo'))


@pytest.fixture(scope='module')
def converted(devkit, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('converted')
    voc.convert(devkit, out, workers=1, progress=False)
    return out


@pytest.fixture(scope='module')
def coco_root(tmp_path_factory) -> Path:
    return demo.make_coco(tmp_path_factory.mktemp('coco'), 8, 3, progress=False)


# Looks


def test_all_80_looks_are_distinct():
    assert len({demo.look(i) for i in range(len(COCO_CLASSES))}) == 80
    shapes, colours = zip(*map(demo.look, range(80)), strict=True)
    assert set(shapes) == set(range(len(demo.SHAPES)))
    assert set(colours) == set(range(len(demo.COLOURS)))


def test_the_20_voc_looks_are_distinct():
    assert [COCO_CLASSES[i] for i in demo.VOC_LOOKS] == [coco_name(name) for name in VOC_CLASSES]
    assert len(set(map(demo.look, demo.VOC_LOOKS))) == 20


@pytest.mark.parametrize('index', range(80))
def test_each_class_is_painted_in_its_colour(index):
    image, objects = demo.render_scene(np.random.default_rng(index), [index])
    assert image.dtype == objects.dtype == np.uint8
    assert image.shape == (*objects.shape, 3) == (demo.SIZE, demo.SIZE, 3)
    assert set(np.unique(objects)) == {0, 1}
    mean = image[objects == 1].mean(0)
    distances = np.linalg.norm(demo.COLOURS * 0.93 - mean, axis=1)
    assert distances.argmin() == demo.look(index)[1]


def test_ring_has_a_hole():
    ring = next(i for i in range(80) if demo.SHAPES[demo.look(i)[0]][1] is not None)
    rng = np.random.default_rng(3)
    objects = demo.render_scene(rng, [ring])[1]
    ys, xs = np.nonzero(objects)
    box = objects[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    assert box[box.shape[0] // 2, box.shape[1] // 2] == 0


# The same files from the same seed


def test_same_seed_same_bytes(devkit, tmp_path):
    again = make_voc(tmp_path)
    assert digests(again) == digests(devkit)


def test_other_seed_other_images(devkit, tmp_path):
    ours, theirs = digests(devkit), digests(make_voc(tmp_path, seed=1))
    assert ours.keys() == theirs.keys()
    assert not any(ours[name] == theirs[name] for name in ours if name.endswith('.jpg'))


def test_more_images_leave_the_first_as_they_are(devkit, tmp_path):
    # So that a longer set contains the shorter one.
    more = digests(make_voc(tmp_path, num_train=TRAIN + 2))
    for name, digest in digests(devkit).items():
        if not name.endswith('train.txt'):
            assert more[name] == digest, name


def test_no_two_images_are_the_same(devkit, coco_root):
    found = [*digests(devkit / 'JPEGImages').values(), *digests(coco_root / 'images').values()]
    assert len(set(found)) == len(found) == TRAIN + VAL + 8 + 3


# VOC layout


def test_layout(devkit):
    assert devkit.name == 'VOC2012'
    for split, count in (('train', TRAIN), ('val', VAL)):
        ids = (devkit / 'ImageSets/Segmentation' / f'{split}.txt').read_text().split()
        assert len(ids) == count
        for name in ids:
            assert Image.open(devkit / 'JPEGImages' / f'{name}.jpg').size == (224, 224)
            for folder in ('SegmentationClass', 'SegmentationObject'):
                assert Image.open(devkit / folder / f'{name}.png').mode == 'P'


def test_palette_is_that_of_voc(devkit):
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for folder in ('SegmentationClass', 'SegmentationObject'):
        png = Image.open(next((devkit / folder).glob('*.png')))
        palette = np.array(png.getpalette()).reshape(-1, 3)
        assert palette.shape == (256, 3)
        assert {i: tuple(palette[i].tolist()) for i in expected} == expected


def test_void_lies_between_objects_and_ground(devkit):
    for path in (devkit / 'SegmentationObject').glob('*.png'):
        labels = np.asarray(Image.open(path))
        assert (labels == 255).any()
        # Of two neighbours with different labels one is void.
        for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()


def test_both_kinds_of_png_agree(devkit):
    for path in (devkit / 'SegmentationObject').glob('*.png'):
        objects = np.asarray(Image.open(path))
        classes = np.asarray(Image.open(devkit / 'SegmentationClass' / path.name))
        assert ((objects == 0) == (classes == 0)).all()
        for k in set(np.unique(objects)) - {0, 255}:
            assert len(np.unique(classes[objects == k])) == 1


def test_converts_with_no_problem(devkit, tmp_path):
    summary = voc.convert(devkit, tmp_path)
    assert {name: counts.images for name, counts in summary.splits.items()} == {'train': TRAIN, 'val': VAL}
    assert not summary.problems and not summary.left_out and not summary.notes
    for counts in summary.splits.values():
        assert 2 * counts.images <= counts.objects <= 4 * counts.images


def test_converted_set_passes_the_checks(devkit, converted):
    for split, count in (('train', TRAIN), ('val', VAL)):
        path = voc.annotation_paths(converted)[split]
        found = read_split(path, devkit, VOC_CLASSES)
        assert (found.images, found.usable) == (count, count)


def test_objects_look_like_their_class(devkit, converted):
    truth = COCO(str(converted / 'instances_train.json'))
    for annotation in truth.anns.values():
        image = np.asarray(Image.open(devkit / truth.imgs[annotation['image_id']]['file_name']))
        mean = image[truth.annToMask(annotation) > 0].mean(0)
        name = coco_name(truth.cats[annotation['category_id']]['name'])
        colour = np.linalg.norm(demo.COLOURS * 0.93 - mean, axis=1).argmin()
        assert colour == demo.look(COCO_CLASSES.index(name))[1]


# COCO layout


def test_coco_set_passes_the_checks(coco_root):
    for split, count in (('train', 8), ('val', 3)):
        found = read_split(coco_root / f'annotations/instances_{split}.json', coco_root / 'images', COCO_CLASSES)
        assert (found.images, found.usable) == (count, count)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_annotations_are_right(coco_root, split):
    truth = COCO(str(coco_root / f'annotations/instances_{split}.json'))
    assert sorted(truth.anns) == list(range(1, len(truth.anns) + 1))
    assert [truth.cats[i]['name'] for i in range(1, 81)] == list(COCO_CLASSES)
    covered = {i: np.zeros((demo.SIZE, demo.SIZE), int) for i in truth.imgs}
    for annotation in truth.anns.values():
        mask = truth.annToMask(annotation)
        assert mask.shape == (demo.SIZE, demo.SIZE)
        assert annotation['area'] == mask.sum() >= 200
        ys, xs = np.nonzero(mask)
        assert annotation['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        covered[annotation['image_id']] += mask
    # Each pixel belongs to one object at most.
    assert max(c.max() for c in covered.values()) == 1


def test_coco_set_is_the_same_from_the_same_seed(coco_root, tmp_path):
    again = demo.make_coco(tmp_path, 8, 3, progress=False)
    assert digests(again) == digests(coco_root)


def test_makers_cover_the_kinds_of_the_configs(loaded):
    for name in ('mask_rcnn_demo.py', 'mask_rcnn_demo_pretrain.py'):
        assert loaded(name).demo_data.kind in demo.MAKERS
