"""Cityscapes' instance PNGs through the converter of all data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.formats import detect
from mmfinetune.data.prepare import prepare
from tests.builders.errors import codes, refused

CLASSES = ['person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle']
LABEL_IDS = (24, 25, 26, 27, 28, 31, 32, 33)
SIZE = (64, 32)


def paths(root: Path, split: str, name: str) -> tuple[Path, Path]:
    city = name.split('_')[0]
    return (
        root / f'leftImg8bit/{split}/{city}/{name}_leftImg8bit.png',
        root / f'gtFine/{split}/{city}/{name}_gtFine_instanceIds.png',
    )


def write(root: Path, split: str, name: str, values: np.ndarray) -> None:
    image, label = paths(root, split, name)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', SIZE).save(image)
    Image.fromarray(values.astype(np.uint16)).save(label)


def scattered(rng: np.random.Generator, values: list[int]) -> np.ndarray:
    image = np.full(SIZE[::-1], 7)  # road
    for value in values:
        image[rng.random(image.shape) < 0.1] = value
    return image


@pytest.fixture
def root(tmp_path) -> Path:
    rng, root = np.random.default_rng(0), tmp_path / 'cityscapes'
    for split, names in (('train', ['aachen_000000_000019', 'ulm_000001_000019']), ('val', ['lindau_000000_000019'])):
        for name in names:
            write(
                root,
                split,
                name,
                scattered(rng, [26000, 26001, 24000, 33, 25, 29000, 30001, 31000, 33999, 23, 0, 30, 29]),
            )
    write(root, 'test', 'berlin_000000_000019', np.zeros(SIZE[::-1]))
    return root


def run(root: Path, **options):
    out = root.parent / 'out'
    summary = prepare(root, out, progress=False, **{'workers': 1, **options})
    return summary, {
        name: json.loads((out / f'annotations/instances_{name}.json').read_text()) for name in summary.splits
    }


def test_every_value_of_a_class_is_one_annotation_with_its_pixels(root):
    assert detect(root)[0] == 'cityscapes'
    summary, made = run(root)
    assert list(made) == ['train', 'val']
    assert [(c['id'], c['name']) for c in made['val']['categories']] == list(enumerate(CLASSES, start=1))
    for split, data in made.items():
        for image in data['images']:
            name = Path(image['file_name']).name.removesuffix('_leftImg8bit.png')
            values = np.asarray(Image.open(paths(root, split, name)[1]))
            wanted = {}
            for value in np.unique(values).tolist():
                label = value // 1000 if value >= 1000 else value
                if label in LABEL_IDS:
                    wanted[value] = (LABEL_IDS.index(label) + 1, int(value < 1000))
            own = [a for a in data['annotations'] if a['image_id'] == image['id']]
            assert [(a['category_id'], a['iscrowd']) for a in own] == list(wanted.values())
            assert set(wanted) == {25, 33, 24000, 26000, 26001, 31000, 33999}
            for value, annotation in zip(wanted, own, strict=True):
                assert (mask_api.decode(annotation['segmentation']) == (values == value)).all()
    assert summary.splits['train'].crowds == 4 and summary.splits['train'].objects == 10
    assert [i['file_name'] for i in made['train']['images']] == [
        'train/aachen/aachen_000000_000019_leftImg8bit.png',
        'train/ulm/ulm_000001_000019_leftImg8bit.png',
    ]


def test_image_without_objects_stays(root):
    write(root, 'val', 'lindau_000000_000019', np.full(SIZE[::-1], 7))
    summary, made = run(root)
    assert len(made['val']['images']) == 1 and summary.splits['val'].empty == 1


@pytest.mark.parametrize(
    'spoil, code',
    [
        (lambda image, label: label.unlink(), 'image-file-missing'),
        (lambda image, label: label.write_bytes(b''), 'image-file-empty'),
        (lambda image, label: label.write_bytes(label.read_bytes()[:90]), 'image-file-unreadable'),
        (lambda image, label: Image.new('RGB', SIZE).save(label), 'cityscapes-mode'),
        (lambda image, label: Image.new('L', (3, 3)).save(label), 'mask-file-size'),
        (lambda image, label: Image.new('L', SIZE, 200).save(label), 'cityscapes-value'),
        (lambda image, label: Image.fromarray(np.full(SIZE[::-1], 65535, np.uint16)).save(label), 'cityscapes-value'),
        (lambda image, label: image.write_bytes(b'x'), 'image-file-unknown'),
        (lambda image, label: image.unlink(), 'cityscapes-no-image'),
    ],
)
def test_bad_files_are_problems_of_one_image(root, spoil, code):
    spoil(*paths(root, 'train', 'ulm_000001_000019'))
    with refused('prepare-problems') as caught:
        run(root)
    assert codes(caught.value.problems) == [code]
    assert 'ulm_000001_000019' in caught.value.problems[0].facts['place']
    _, made = run(root, skip_bad=True)
    assert len(made['train']['images']) == 1


@pytest.mark.parametrize('missing, message', [('gtFine', 'gtFine/'), ('leftImg8bit', 'leftImg8bit/')])
def test_half_a_data_set_is_refused(root, missing, message):
    (root / missing).rename(root / 'away')
    with refused('cityscapes-incomplete') as caught:
        run(root, format='cityscapes')
    assert caught.value.problems[0] == message
    with refused('format-unknown'):
        run(root)


def test_coarse_labels_are_not_taken_for_fine_ones(root):
    for path in (root / 'gtFine').rglob('*.png'):
        path.rename(path.with_name(path.name.replace('gtFine', 'gtCoarse')))
    with refused('cityscapes-incomplete'):
        run(root)
