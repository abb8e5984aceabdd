"""A weights file is verified, read and compared with the model once in a command, whatever the command."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from mmfinetune.utils import files
from mmfinetune.weights import find, transfer
from mmfinetune.weights.source import RGB_MEAN, RGB_STD
from tests.builders.runs import drive, train_tool


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each file is hashed and read, by (what, name), and how many plans are made."""
    found: Counter = Counter()

    def counted(what: str, function, name=lambda path, *_: Path(path).name):
        def wrapper(*args, **kwargs):
            found[what, name(*args)] += 1
            return function(*args, **kwargs)

        return wrapper

    find._sha256.cache_clear()  # an earlier test may have verified the file
    monkeypatch.setattr(files, 'digest', counted('hash', files.digest))
    monkeypatch.setattr(torch, 'load', counted('read', torch.load))
    plan = counted('plan', transfer.plan_transfer, lambda target, source, *_: source.path.name)
    monkeypatch.setattr(transfer, 'plan_transfer', plan)
    return found


@pytest.fixture
def file(in_site: Path) -> Path:
    [file] = in_site.glob('pretrain/*.pth')
    return file.relative_to(in_site)


@pytest.mark.parametrize(
    'args',
    [
        ('--train', '--cfg-options', 'train_cfg.max_epochs=1'),
        ('--check-weights',),
        ('--check-weights', '--train', '--weights', '{file}', '--cfg-options', 'train_cfg.max_epochs=1'),
        ('--test', '--head-init', 'remap'),
    ],
    ids=['train', 'check', 'check and train', 'zero shot'],
)
def test_weights_are_hashed_read_and_planned_once(file, tmp_path, counts, args):
    outcome = train_tool('tiny.py', *(arg.format(file=file) for arg in args), '--work-dir', tmp_path / 'run')
    assert outcome.code == 0, outcome.err
    assert {what: n for (what, name), n in counts.items() if name == file.name} == {'hash': 1, 'read': 1, 'plan': 1}


def test_tested_checkpoint_is_hashed_read_and_planned_once(in_finished_run, tmp_path, counts):
    [file] = (in_finished_run.kept / 'tiny').glob('best_*.pth')
    outcome = train_tool('tiny.py', '--test', '--checkpoint', file, '--work-dir', tmp_path / 'run')
    assert outcome.code == 0, outcome.err
    assert {what: n for (what, name), n in counts.items() if name == file.name} == {'hash': 1, 'read': 1, 'plan': 1}


# Files that other projects leave


@pytest.fixture
def script_checkpoint(in_finished_run, tmp_path: Path) -> Path:
    """What the multi-GPU script of torchvision's reference writes of a model of 20 classes."""
    converted = drive(
        'convert_weights', in_finished_run.kept / 'tiny/epoch_2.pth', tmp_path / 'a.pth', '--to', 'torchvision'
    )
    assert converted.code == 0, converted.err
    args = argparse.Namespace(lr=0.02, data_path='/data', device='cuda', amp=False, output_dir=Path('out'))
    file = tmp_path / 'model_25.pth'
    config = f'_base_ = {str(Path("tiny.py").resolve())!r}\n'
    (tmp_path / 'tv.py').write_text(
        f'{config}model = dict(data_preprocessor=dict(mean={list(RGB_MEAN)}, std={list(RGB_STD)}))\n'
    )
    torch.save({'model': torch.load(tmp_path / 'a.pth'), 'optimizer': {}, 'args': args, 'epoch': 25}, file)
    return file


def test_own_classes_keep_their_heads_by_the_command_line(script_checkpoint, tmp_path):
    config = script_checkpoint.with_name('tv.py')
    weights = ('--weights', script_checkpoint)
    kept = train_tool(config, '--check-weights', '--json', *weights, '--head-init', 'keep')
    assert kept.code == 0, kept.err
    found = json.loads(kept.out)
    assert not found['reinit'] and 'roi_head.bbox_head.fc_cls.weight' in found['loaded']
    assert 'eps' not in ' '.join(found['notes']) or 'tools/convert_weights.py' in ' '.join(found['notes'])
    trained = train_tool(
        *(config, '--train', *weights, '--head-init', 'keep', '--work-dir', tmp_path / 'run'),
        *('--cfg-options', 'train_cfg.max_epochs=1'),
    )
    assert trained.code == 0, trained.err
    assert 'tensors loaded' in trained.out and 're-initialized' not in trained.out
    remapped = train_tool(config, '--check-weights', *weights, '--head-init', 'remap')
    assert (remapped.code, remapped.error) == (2, 'weights-remap-classes') and '--head-init keep' in remapped.err


def test_a_model_of_torchvision_is_tested_with_its_own_roi_align(script_checkpoint, tmp_path):
    config = script_checkpoint.with_name('tv.py')
    layers = 'model.roi_head.{}_roi_extractor.roi_layer.{}'
    theirs = [layers.format(kind, end) for kind in ('bbox', 'mask') for end in ('sampling_ratio=2', 'aligned=False')]
    test = (config, '--test', '--checkpoint', script_checkpoint, '--work-dir', tmp_path / 'run')
    found = []
    for options in (
        [],
        ['--cfg-options', *theirs],
        ['--cfg-options', *(o.replace('False', 'True') for o in theirs[1::2])],
    ):
        done = train_tool(*test, *options)
        assert done.code == 0, done.err
        assert ('sampling_ratio=2' in done.err) is (not options)
        found.append([Path(f'predictions.{kind}.json').read_text() for kind in ('bbox', 'segm')])
    assert found[0] == found[1] != found[2]
    image = next(Path('data/demo/VOCdevkit/VOC2012/JPEGImages').glob('*'))
    model = ('--config', config, '--checkpoint', script_checkpoint)
    predicted = drive('predict', image, *model, '--json', '--out', tmp_path / 'out')
    assert predicted.code == 0 and 'sampling_ratio=2' in predicted.err, predicted.err
    json.loads(predicted.out)
    untrained = train_tool(*test[:2], '--weights', script_checkpoint, '--head-init', 'keep', *test[4:])
    assert untrained.code == 0 and 'sampling_ratio=2' in untrained.out, untrained.err


# `load_from`


def test_load_from_goes_through_report_and_style_check(file, tmp_path):
    caffe = Path(shutil.copy(file, tmp_path / 'mask_rcnn_r50_caffe_fpn_1x_coco.pth'))
    done = train_tool('tiny.py', '--train', '--work-dir', tmp_path / 'run', '--cfg-options', f'load_from={caffe}')
    assert (done.code, done.error) == (2, 'weights-do-not-fit'), done.err
    for cure in ('model.backbone.style=caffe', 'bgr_to_rgb', 'mean (103.53', 'std (1, 1, 1)'):
        assert cure in done.err
    assert not (tmp_path / 'run').exists()


def test_load_from_keeps_heads_of_the_same_classes_and_draws_others(in_finished_run, tmp_path):
    for name, drawn in ((in_finished_run.kept / 'tiny/epoch_2.pth', 0), (in_finished_run.weights, 6)):
        done = train_tool('tiny.py', '--check-weights', '--json', '--cfg-options', f'load_from={name}')
        assert done.code == 0, done.err
        assert len(json.loads(done.out)['reinit']) == drawn
