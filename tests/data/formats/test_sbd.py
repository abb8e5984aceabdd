"""SBD: masks, lists, and no image of VOC 2012 val."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from scipy.io import savemat

from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.data.formats import detect
from mmfinetune.data.prepare import prepare
from mmfinetune.utils.errors import Message
from tests.builders.errors import codes, refused


def run(src: Path, out: Path, **options):
    summary = prepare(src, out, progress=False, **{'workers': 1, **options})
    return summary, {
        name: json.loads((out / f'annotations/instances_{name}.json').read_text()) for name in summary.splits
    }


class Sbd:
    """A made SBD: scattered pixels and rectangles as objects."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / 'benchmark_RELEASE' / 'dataset'
        self.rng = np.random.default_rng(3)
        for name in ('inst', 'img', 'cls'):
            (self.folder / name).mkdir(parents=True)
        self.lists = {'train': ['2008_000002', '2008_000003', '2009_000001'], 'val': ['2008_000004', '2010_000009']}
        for split, ids in self.lists.items():
            (self.folder / f'{split}.txt').write_text('\n'.join(ids) + '\n')
            for image_id in ids:
                self.add(image_id)

    def add(self, image_id: str, count: int | None = None) -> None:
        height, width = (int(n) for n in self.rng.integers(20, 60, 2))
        count = int(self.rng.integers(1, 5)) if count is None else count
        objects = np.zeros((height, width), np.uint8)
        for number in range(1, count + 1):
            objects[self.rng.random(objects.shape) < 0.1] = number
        self.write(image_id, objects, self.rng.integers(1, 21, count))
        Image.new('RGB', (width, height)).save(self.folder / f'img/{image_id}.jpg')

    def write(self, image_id: str, objects: np.ndarray, labels: np.ndarray) -> None:
        # As in the original: a struct of the image, cells of boundaries, and a column of classes.
        boundaries = np.empty((len(labels), 1), object)
        for k in range(len(labels)):
            boundaries[k, 0] = objects == k + 1
        savemat(
            self.folder / f'inst/{image_id}.mat',
            {
                'GTinst': {
                    'Segmentation': objects,
                    'Boundaries': boundaries,
                    'Categories': np.array(labels, np.uint8).reshape(-1, 1),
                }
            },
            do_compression=True,
        )


@pytest.fixture
def sbd(tmp_path) -> Sbd:
    return Sbd(tmp_path / 'sbd')


def test_sbd_masks_are_the_pixels_of_the_mat_files(sbd, tmp_path):
    from scipy.io import loadmat

    assert detect(sbd.root)[0] == detect(sbd.folder)[0] == 'sbd'
    summary, made = run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert {name: len(data['images']) for name, data in made.items()} == {'train': 3, 'val': 2}
    for split, data in made.items():
        assert [Path(i['file_name']).stem for i in data['images']] == sbd.lists[split]
        for image in data['images']:
            found = loadmat(sbd.folder / f'inst/{Path(image["file_name"]).stem}.mat')['GTinst']
            objects = found['Segmentation'][0, 0]
            labels = found['Categories'][0, 0].ravel().tolist()
            own = [a for a in data['annotations'] if a['image_id'] == image['id']]
            assert [a['category_id'] for a in own] == labels
            for number, annotation in enumerate(own, start=1):
                assert (mask_api.decode(annotation['segmentation']) == (objects == number)).all()
    assert [c['name'] for c in made['train']['categories']] == list(VOC_CLASSES)
    assert not summary.notes


def test_sbd_trains_on_nothing_of_voc_val(sbd, tmp_path):
    with refused('sbd-list', path=sbd.folder / 'train_noval.txt') as caught:
        run(sbd.root, tmp_path / 'out')
    assert codes(caught.value.problems) == ['text-file-missing']
    assert '--voc' in caught.value.hint and 'home.bharathh.info' in caught.value.hint
    voc_root = tmp_path / 'VOCdevkit/VOC2012'
    (voc_root / 'ImageSets/Segmentation').mkdir(parents=True)
    (voc_root / 'JPEGImages').mkdir()
    (voc_root / 'ImageSets/Segmentation/val.txt').write_text('2008_000003\n2010_000009\n2007_1\n')
    summary, made = run(sbd.root, tmp_path / 'a', voc=tmp_path)
    assert list(made) == ['train']
    wanted = ['2008_000002', '2008_000004', '2009_000001']
    assert [Path(i['file_name']).stem for i in made['train']['images']] == wanted
    assert summary.notes == [Message('sbd-other-list', ''), Message('sbd-val-left-out', '', count=2)]
    (sbd.folder / 'train_noval.txt').write_text('2008_000002\r\n')
    _, made = run(sbd.root, tmp_path / 'b', voc=tmp_path)
    assert [i['file_name'] for i in made['train']['images']] == ['2008_000002.jpg']
    _, made = run(sbd.root, tmp_path / 'c', voc=tmp_path, sbd_split='trainval_noval')
    assert len(made['train']['images']) == 3
    with refused('sbd-needs-voc'):
        run(sbd.root, tmp_path / 'd', sbd_split='trainval_noval')


MAT = 'inst/2008_000003.mat'
SMALL = np.array([[0, 1], [2, 2]], np.uint8)


@pytest.mark.parametrize(
    'spoil, code, place',
    [
        (lambda sbd, i: (sbd.folder / f'inst/{i}.mat').unlink(), 'sbd-mat-missing', 'inst/{i}.mat'),
        (lambda sbd, i: (sbd.folder / f'inst/{i}.mat').write_bytes(b''), 'sbd-mat-unreadable', 'inst/{i}.mat'),
        (
            lambda sbd, i: (sbd.folder / f'inst/{i}.mat').write_bytes(b'MATLAB 5.0' + b'x' * 300),
            'sbd-mat-unreadable',
            'inst/{i}.mat',
        ),
        (lambda sbd, i: savemat(sbd.folder / f'inst/{i}.mat', {'GTcls': SMALL}), 'sbd-mat-unreadable', 'inst/{i}.mat'),
        (lambda sbd, i: sbd.write(i, SMALL, [1, 2]), 'mask-file-size', 'inst/{i}.mat'),
        (lambda sbd, i: (sbd.folder / f'img/{i}.jpg').unlink(), 'image-file-missing', 'img/{i}.jpg'),
    ],
)
def test_bad_sbd_files_are_problems_of_one_image(sbd, tmp_path, spoil, code, place):
    image_id = '2008_000003'
    spoil(sbd, image_id)
    with refused('prepare-problems') as caught:
        run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert [(m.code, m.facts['place']) for m in caught.value.problems] == [(code, place.format(i=image_id))]
    _, made = run(sbd.root, tmp_path / 'out', sbd_split='official', skip_bad=True)
    assert len(made['train']['images']) == 2


@pytest.mark.parametrize(
    'objects, labels, message',
    [
        (SMALL, [1], Message('sbd-no-class', '', place=MAT, number=2, count=1)),
        (SMALL, [1, 21], Message('sbd-class-number', '', place=MAT, number=2, label=21)),
        (SMALL, [0, 1], Message('sbd-class-number', '', place=MAT, number=1, label=0)),
        (SMALL.astype(float) / 3, [1, 2], Message('sbd-mat-type', '', place=MAT)),
    ],
)
def test_sbd_objects_without_a_class(sbd, tmp_path, objects, labels, message):
    sbd.write('2008_000003', objects, labels)
    Image.new('RGB', (2, 2)).save(sbd.folder / 'img/2008_000003.jpg')
    with refused('prepare-problems') as caught:
        run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert caught.value.problems == [message]


def test_sbd_images_with_one_or_absent_objects(sbd, tmp_path):
    for image_id, objects, labels in (('2008_000002', SMALL == 2, [7]), ('2008_000003', SMALL, [4, 5, 6])):
        sbd.write(image_id, objects.astype(np.uint8), labels)
        Image.new('RGB', (2, 2)).save(sbd.folder / f'img/{image_id}.jpg')
    summary, made = run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert [a['category_id'] for a in made['train']['annotations'][:3]] == [7, 4, 5]
    assert summary.notes == [Message('sbd-no-pixel', '', place=MAT, absent=1, count=3)]


@pytest.mark.parametrize(
    'text, problem',
    [
        ('', Message('id-list-empty', '')),
        ('a b\nc\n', Message('id-list-not-an-id', '', line=1, text='a b')),
        ('a\n../b\n', Message('id-list-not-an-id', '', line=2, text='../b')),
        ('a\nb\na\n', Message('id-list-twice', '', line=3, text='a')),
    ],
)
def test_bad_sbd_lists(sbd, tmp_path, text, problem):
    (sbd.folder / 'train.txt').write_text(text)
    with refused('sbd-list') as caught:
        run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert caught.value.problems == [problem]


def test_no_sbd(tmp_path):
    with refused('sbd-missing'):
        run(tmp_path, tmp_path.with_name(tmp_path.name + '_out'), format='sbd')
