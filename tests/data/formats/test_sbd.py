"""The VOC devkit and SBD through the converter of all data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from scipy.io import savemat

from mmfinetune.data import demo
from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.data.formats import voc
from mmfinetune.data.prepare import prepare, recognise
from mmfinetune.utils.errors import UserError


@pytest.fixture(scope='module')
def made_devkit(tmp_path_factory) -> Path:
    """Not to be changed."""
    return demo.make_voc(tmp_path_factory.mktemp('voc'), 6, 4, progress=False)


@pytest.fixture
def devkit(tmp_path) -> Path:
    return demo.make_voc(tmp_path / 'voc', 3, 2, progress=False)


def run(src: Path, out: Path, **options):
    summary = prepare(src, out, progress=False, **{'workers': 1, **options})
    return summary, {
        name: json.loads((out / f'annotations/instances_{name}.json').read_text()) for name in summary.splits
    }


def without_prefix(data: dict) -> dict:
    return {
        **data,
        'info': None,
        'images': [{**image, 'file_name': Path(image['file_name']).name} for image in data['images']],
    }


@pytest.mark.parametrize('level', [0, 1, 2])
def test_devkit_gives_what_prepare_voc_gives(made_devkit, tmp_path, level):
    src = [made_devkit, *made_devkit.parents][level]
    assert recognise(src)[0] == 'voc'
    summary, made = run(src, tmp_path / 'out')
    old = voc.convert(made_devkit, tmp_path / 'old', workers=1, progress=False)
    for split in ('train', 'val'):
        assert without_prefix(made[split]) == without_prefix(json.loads(old[split].path.read_text()))
        assert summary.splits[split].per_class == old[split].per_class
    image = made['train']['images'][0]['file_name']
    assert (tmp_path / 'out/images' / image).samefile(made_devkit / 'JPEGImages' / image)


def test_real_devkit_gives_the_pixels_of_its_pngs(real_data, tmp_path):
    summary, made = run(real_data / 'voc2012_real', tmp_path / 'out', placing='reference')
    folder = real_data / 'voc2012_real/VOCdevkit/VOC2012'
    count = 0
    for data in made.values():
        for image in data['images']:
            stem = Path(image['file_name']).stem
            objects = np.asarray(Image.open(folder / f'SegmentationObject/{stem}.png'))
            labels = np.asarray(Image.open(folder / f'SegmentationClass/{stem}.png'))
            own = [a for a in data['annotations'] if a['image_id'] == image['id']]
            numbers = [n for n in np.unique(objects) if n not in (0, 255)]
            for number, annotation in zip(numbers, own, strict=True):
                mask = mask_api.decode(annotation['segmentation']).astype(bool)
                assert (mask == (objects == number)).all()
                assert set(labels[mask].tolist()) == {annotation['category_id']}
                count += 1
    assert count == sum(s.objects for s in summary.splits.values()) == 67


def test_disputed_images_are_problems_unless_masks_are_trusted(devkit, tmp_path):
    image_id = (devkit / 'ImageSets/Segmentation/train.txt').read_text().split()[0]
    (devkit / f'Annotations/{image_id}.xml').write_text('<annotation/>')
    with pytest.raises(UserError, match=f'not in Annotations/{image_id}.xml') as caught:
        run(devkit, tmp_path / 'out')
    assert '--trust-masks' in caught.value.cure and not (tmp_path / 'out').exists()
    summary, made = run(devkit, tmp_path / 'out', trust_masks=True)
    assert len(made['train']['images']) == 3
    assert any(image_id in note for note in summary.notes)


def test_damaged_devkit_is_told_at_once(devkit, tmp_path):
    ids = (devkit / 'ImageSets/Segmentation/val.txt').read_text().split()
    (devkit / f'JPEGImages/{ids[0]}.jpg').unlink()
    (devkit / f'SegmentationObject/{ids[1]}.png').write_bytes(b'')
    with pytest.raises(UserError) as caught:
        run(devkit, tmp_path / 'out')
    assert len(caught.value.problems) == 2 and '2 of 5 images unusable' in str(caught.value)
    (devkit / 'ImageSets/Segmentation/val.txt').unlink()
    with pytest.raises(UserError, match='not a whole VOC 2012 devkit') as caught:
        run(devkit, tmp_path / 'out', kind='voc')
    assert '--download' not in str(caught.value)
    with pytest.raises(UserError, match='no VOC 2012 devkit here'):
        run(tmp_path, tmp_path.with_name(tmp_path.name + '_out'), kind='voc')


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

    assert recognise(sbd.root)[0] == recognise(sbd.folder)[0] == 'sbd'
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
    with pytest.raises(UserError, match='train_noval.txt: missing') as caught:
        run(sbd.root, tmp_path / 'out')
    assert '--voc' in caught.value.cure and 'home.bharathh.info' in caught.value.cure
    voc_root = tmp_path / 'VOCdevkit/VOC2012'
    (voc_root / 'ImageSets/Segmentation').mkdir(parents=True)
    (voc_root / 'JPEGImages').mkdir()
    (voc_root / 'ImageSets/Segmentation/val.txt').write_text('2008_000003\n2010_000009\n2007_1\n')
    summary, made = run(sbd.root, tmp_path / 'a', voc=tmp_path)
    assert list(made) == ['train']
    wanted = ['2008_000002', '2008_000004', '2009_000001']
    assert [Path(i['file_name']).stem for i in made['train']['images']] == wanted
    assert any('2 images of VOC 2012 val left out' in note for note in summary.notes)
    (sbd.folder / 'train_noval.txt').write_text('2008_000002\r\n')
    _, made = run(sbd.root, tmp_path / 'b', voc=tmp_path)
    assert [i['file_name'] for i in made['train']['images']] == ['2008_000002.jpg']
    _, made = run(sbd.root, tmp_path / 'c', voc=tmp_path, sbd_split='trainval_noval')
    assert len(made['train']['images']) == 3
    with pytest.raises(UserError, match='needs the list of VOC 2012 val'):
        run(sbd.root, tmp_path / 'd', sbd_split='trainval_noval')


SMALL = np.array([[0, 1], [2, 2]], np.uint8)


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda sbd, i: (sbd.folder / f'inst/{i}.mat').unlink(), 'inst/{i}.mat: missing'),
        (lambda sbd, i: (sbd.folder / f'inst/{i}.mat').write_bytes(b''), 'inst/{i}.mat: unreadable'),
        (
            lambda sbd, i: (sbd.folder / f'inst/{i}.mat').write_bytes(b'MATLAB 5.0' + b'x' * 300),
            'inst/{i}.mat: unreadable',
        ),
        (lambda sbd, i: savemat(sbd.folder / f'inst/{i}.mat', {'GTcls': SMALL}), 'inst/{i}.mat: unreadable'),
        (lambda sbd, i: sbd.write(i, SMALL, [1, 2]), 'inst/{i}.mat: 2x2 pixels, but img/{i}.jpg has'),
        (lambda sbd, i: (sbd.folder / f'img/{i}.jpg').unlink(), 'img/{i}.jpg: missing'),
    ],
)
def test_bad_sbd_files_are_problems_of_one_image(sbd, tmp_path, spoil, message):
    image_id = '2008_000003'
    spoil(sbd, image_id)
    with pytest.raises(UserError) as caught:
        run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert len(caught.value.problems) == 1
    assert message.format(i=image_id) in caught.value.problems[0]
    _, made = run(sbd.root, tmp_path / 'out', sbd_split='official', skip_bad=True)
    assert len(made['train']['images']) == 2


@pytest.mark.parametrize(
    'objects, labels, message',
    [
        (SMALL, [1], 'object 2 has no class; Categories has 1'),
        (SMALL, [1, 21], 'object 2 has the class 21, not one of 1 to 20'),
        (SMALL, [0, 1], 'object 1 has the class 0'),
        (SMALL.astype(float) / 3, [1, 2], 'is no image of integers'),
    ],
)
def test_sbd_objects_without_a_class(sbd, tmp_path, objects, labels, message):
    sbd.write('2008_000003', objects, labels)
    Image.new('RGB', (2, 2)).save(sbd.folder / 'img/2008_000003.jpg')
    with pytest.raises(UserError, match=message):
        run(sbd.root, tmp_path / 'out', sbd_split='official')


def test_sbd_images_with_one_or_absent_objects(sbd, tmp_path):
    for image_id, objects, labels in (('2008_000002', SMALL == 2, [7]), ('2008_000003', SMALL, [4, 5, 6])):
        sbd.write(image_id, objects.astype(np.uint8), labels)
        Image.new('RGB', (2, 2)).save(sbd.folder / f'img/{image_id}.jpg')
    summary, made = run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert [a['category_id'] for a in made['train']['annotations'][:3]] == [7, 4, 5]
    assert summary.notes == ['inst/2008_000003.mat: 1 of 3 objects have no pixel']


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'no image id in it'),
        ('a b\n', "'a b' is not one image id"),
        ('a\n../b\n', 'line 2'),
        ('a\nb\na\n', "line 3: 'a' is listed twice"),
    ],
)
def test_bad_sbd_lists(sbd, tmp_path, text, message):
    (sbd.folder / 'train.txt').write_text(text)
    with pytest.raises(UserError, match='not a list of image ids') as caught:
        run(sbd.root, tmp_path / 'out', sbd_split='official')
    assert message in str(caught.value)


def test_no_sbd(tmp_path):
    with pytest.raises(UserError, match='no SBD here'):
        run(tmp_path, tmp_path.with_name(tmp_path.name + '_out'), kind='sbd')
