"""The data of a run: each annotation file is parsed once, each image opened once."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmfinetune.data import demo, preflight
from mmfinetune.data.check import images as check_images
from mmfinetune.data.layout import Prepared
from tests.builders.runs import CONFIGS, DEVKIT, drive, train_tool

# MMEngine's visualizer, of boxes that end at the image's edge.
pytestmark = pytest.mark.filterwarnings('ignore:.*out of bounds')


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, int]]:
    """How often the package itself has parsed each annotation file of a folder, by split."""
    parsed: Counter[str] = Counter()
    loads = json.loads

    def count(text, module, **options):
        if module.startswith('mmfinetune'):
            parsed[text.decode() if isinstance(text, bytes) else text] += 1
        return loads(text, **options)

    def caller() -> str:
        return sys._getframe(2).f_globals['__name__']

    monkeypatch.setattr(json, 'loads', lambda text, **options: count(text, caller(), **options))
    monkeypatch.setattr(json, 'load', lambda file, **options: count(file.read(), caller(), **options))

    def by_split(root: Path) -> dict[str, int]:
        files = Prepared(root).annotations.glob('instances_*.json')
        return {path.stem.removeprefix('instances_'): parsed[path.read_text()] for path in files}

    return by_split


def test_start_of_a_training_run(own_site, parses, monkeypatch):
    opened: Counter[str] = Counter()
    look_at = check_images.look_at
    monkeypatch.setattr(check_images, 'look_at', lambda path: opened.update([path.name]) or look_at(path))
    monkeypatch.setattr(check_images, 'read_images', in_this_process(check_images.read_images))
    monkeypatch.setattr(preflight, 'image_size', lambda path: opened.update([path.name]))
    outcome = train_tool('tiny.py', '--train', '--cfg-options', 'train_cfg.max_epochs=1')
    assert outcome.code == 0, outcome.err
    assert parses(DEVKIT) == {'train': 1, 'val': 1}
    listed = [
        i['file_name']
        for s in ('train', 'val')
        for i in json.loads(Prepared(DEVKIT).annotation(s).read_text())['images']
    ]
    assert opened == Counter(Path(name).name for name in listed)


def in_this_process(read_images: Callable) -> Callable:
    return lambda paths, workers, progress: read_images(paths, 1, progress)


def test_evaluation_and_prediction(in_finished_run, tmp_path, parses):
    evaluated = drive('evaluate', 'work_dirs/tiny', '--no-pictures', '--out', tmp_path / 'evaluation')
    assert evaluated.code == 0, evaluated.err
    assert parses(DEVKIT) == {'train': 0, 'val': 1}
    image = DEVKIT / 'JPEGImages/demo_val_0000.jpg'
    predicted = drive('predict', image, '--run', 'work_dirs/tiny', '--out', tmp_path / 'predictions')
    assert predicted.code == 0, predicted.err
    assert parses(DEVKIT) == {'train': 0, 'val': 2}


def test_tools_for_own_data(own_site, parses):
    found = drive('check_dataset', DEVKIT, '--image-root', DEVKIT)
    assert found.code == 0, found.out + found.err
    assert parses(DEVKIT) == {'train': 1, 'val': 1}
    split = drive('split_dataset', Prepared(DEVKIT).annotation('train'), '--ratios', '50', '50', '--out', 'split')
    assert split.code == 0, split.err
    assert parses(DEVKIT) == {'train': 2, 'val': 1}
    base = CONFIGS / 'mask_rcnn_demo.py'
    config = drive('new_config', '--data', DEVKIT, '--name', 'own', '--base', base, '--out', 'own.py')
    assert config.code == 0, config.err
    assert parses(DEVKIT) == {'train': 3, 'val': 2}


def add_image(root: Path, split: str, size: tuple[int, int]) -> None:
    """Put one more image with an object into a prepared folder."""
    path = Prepared(root).annotation(split)
    data = json.loads(path.read_text())
    folder, name = Path(data['images'][0]['file_name']).parent, f'odd_{split}.png'
    Image.new('L', size, 9).save(root / folder / name)
    (width, height), number = size, 10**6
    data['images'].append({'id': number, 'file_name': str(folder / name), 'width': width, 'height': height})
    outline = [0, 0, width, 0, width, height, 0, height]
    entry = {'id': number, 'image_id': number, 'category_id': data['categories'][0]['id'], 'iscrowd': 0}
    entry |= {'bbox': [0, 0, width, height], 'area': width * height, 'segmentation': [outline]}
    data['annotations'].append(entry)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize('size', [(5000, 1), (1, 5000), (2000, 2)])
def test_images_that_the_pipeline_cannot_process(own_site, size):
    add_image(DEVKIT, 'val', size)
    for args in (('--dry-run',), ('--train',), ('--train', '--no-check')):
        outcome = train_tool('tiny.py', *args)
        assert (outcome.code, outcome.error) == (2, 'images-unfit'), outcome.err
        assert 'odd_val.png' in outcome.err
        assert f'{size[0]}x{size[1]}' in outcome.err
    outcome = drive('check_dataset', '--config', 'tiny.py', '--no-cache', '--json')
    assert outcome.code == 1
    (finding,) = [f for f in json.loads(outcome.out)['findings'] if f['code'] == 'image-pipeline']
    assert (finding['severity'], finding['count']) == ('error', 1)


def test_images_that_the_pipeline_can_process_or_training_leaves_out(own_site):
    add_image(DEVKIT, 'val', (1600, 40))
    add_image(DEVKIT, 'train', (5000, 1))  # mmdet leaves out what is under 32 px
    assert train_tool('tiny.py', '--dry-run').code == 0
    outcome = train_tool('tiny.py', '--dry-run', '--cfg-options', 'train_dataloader.dataset.filter_cfg.min_size=1')
    assert outcome.error == 'images-unfit'


def test_demo_data_on_a_read_only_disk(in_site, monkeypatch, tmp_path):
    def make(root, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(root))

    monkeypatch.setitem(demo.MAKERS, 'voc', make)
    monkeypatch.chdir(tmp_path)
    done = train_tool(in_site / 'tiny.py', '--train', '--work-dir', tmp_path / 'run')
    assert (done.code, done.error) == (2, 'file-not-writable'), done.err
    assert list(tmp_path.iterdir()) == []


# Wrappers, and evaluators that read another file


def plan_of(path: Path, text: str, *options: str):
    """The dry run of a config that inherits the site's."""
    (path / 'child.py').write_text(f'_base_ = {str(Path("tiny.py").resolve())!r}\n{text}')
    return train_tool(path / 'child.py', '--dry-run', *options)


OTHER = "dict(_base_.train_dataloader.dataset, ann_file='annotations/instances_val.json')"
JOINED = f"dict(type='ConcatDataset', datasets=[_base_.train_dataloader.dataset, {OTHER}])"
REPEATED = f"dict(type='mmengine.RepeatDataset', times=3, dataset={JOINED})"
MIXED = f"dict(type='mmdet.MultiImageMixDataset', pipeline=[], dataset={REPEATED})"


@pytest.mark.parametrize(('dataset', 'steps'), [(JOINED, '12 images'), (REPEATED, '36 samples'), (MIXED, '36 samples')])
def test_plan_sees_through_wrappers(in_site, tmp_path, dataset, steps):
    outcome = plan_of(tmp_path, f'train_dataloader = dict(dataset=dict(_delete_=True, **{dataset}))')
    assert outcome.code == 0, outcome.err
    for line in ('Data:  train.1 8 images', 'Data:  train.2 4 images', f'Steps: {steps}', 'lr/roi_head'):
        assert line in outcome.out
    checked = drive('check_dataset', '--config', tmp_path / 'child.py', '--no-cache', '--json')
    report = json.loads(checked.out)
    assert [s['name'] for s in report['splits']] == ['train.1', 'train.2, val, test']
    leaks = [f for f in report['findings'] if f['code'] == 'leak-content']
    assert [(f['split'], f['count']) for f in leaks] == [('train / test, val', 4)]


def test_classes_are_compared_within_wrappers(in_site, tmp_path):
    swapped = "dict(_base_.train_dataloader.dataset, metainfo=dict(classes=('car', 'aeroplane')))"
    dataset = f"dict(type='RepeatDataset', times=2, dataset={swapped})"
    outcome = plan_of(tmp_path, f'train_dataloader = dict(dataset=dict(_delete_=True, **{dataset}))')
    assert (outcome.code, outcome.error) == (2, 'config-class-count')
    twenty = swapped.replace("('car', 'aeroplane')", '_base_.train_dataloader.dataset.metainfo.classes[::-1]')
    dataset = f"dict(type='ConcatDataset', datasets=[_base_.train_dataloader.dataset, {twenty}])"
    outcome = plan_of(tmp_path, f'train_dataloader = dict(dataset=dict(_delete_=True, **{dataset}))')
    assert (outcome.code, outcome.error) == (2, 'coco-classes')


def test_data_root_does_not_join_folders(in_site, tmp_path):
    outcome = plan_of(
        tmp_path,
        f'train_dataloader = dict(dataset=dict(_delete_=True, **{JOINED.replace("val.json", "x.json")}))\n'
        "train_dataloader['dataset']['datasets'][1]['data_root'] = 'elsewhere'",
        '--data-root',
        str(DEVKIT),
    )
    assert (outcome.code, outcome.error) == (2, 'data-root-several')


def test_evaluators_are_compared_with_their_loaders(in_site, tmp_path):
    """Another file with the same images and objects is as good, another split is not."""
    val, train = (Prepared(DEVKIT).annotation(split) for split in ('val', 'train'))
    evaluator = 'val_evaluator = dict(ann_file={!r})\ntest_evaluator = val_evaluator'
    copied = tmp_path / 'copied.json'
    copied.write_bytes(val.read_bytes())
    link = tmp_path / 'link.json'
    link.symlink_to(val.resolve())
    for same in (copied, link, val.resolve()):
        assert plan_of(tmp_path, evaluator.format(str(same))).code == 0
    less = json.loads(val.read_text())
    less['annotations'].pop()
    (tmp_path / 'less.json').write_text(json.dumps(less))
    for other in (train, tmp_path / 'less.json'):
        outcome = plan_of(tmp_path, evaluator.format(str(other)))
        assert (outcome.code, outcome.error) == (2, 'evaluator-files')
        assert outcome.err.count(str(other)) == 2
    outcome = plan_of(tmp_path, evaluator.format('nowhere.json'))
    assert (outcome.code, outcome.error) == (2, 'coco-missing')
    # Nor may one evaluator stand for several data sets.
    text = f"val_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[{OTHER}, _base_.train_dataloader.dataset]))"
    assert plan_of(tmp_path, text).error == 'evaluator-files'
