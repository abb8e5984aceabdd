"""How long an epoch is: as the training loop has it, through wrappers, filters and samplers."""

from __future__ import annotations

import copy
import json

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmfinetune.engine import batch_size
from tests.builders.coco import CocoData
from tests.builders.errors import refused


@pytest.fixture
def dataset(tmp_path) -> dict:
    """Three images, one of them with an object, one with a crowd region."""
    CocoData(tmp_path).write()
    prefix = {'img': str(tmp_path)}
    classes = {'classes': ('cat', 'dog')}
    return {
        'type': 'CocoDataset',
        'ann_file': str(tmp_path / 'instances.json'),
        'data_prefix': prefix,
        'metainfo': classes,
    }


def config(dataset: dict, **loader) -> Config:
    loader = {'batch_size': 2, 'num_workers': 0, 'sampler': {'type': 'DefaultSampler', 'shuffle': True}, **loader}
    return Config({'default_scope': 'mmdet', 'train_dataloader': {**loader, 'dataset': dataset}})


def repeated(dataset: dict, times: int) -> dict:
    return {'type': 'mmengine.RepeatDataset', 'times': times, 'dataset': dataset}


def joined(*datasets: dict) -> dict:
    return {'type': 'mmdet.ConcatDataset', 'datasets': list(datasets)}


@pytest.mark.parametrize(
    ('make', 'samples', 'steps'),
    [
        (lambda d: d, 3, 2),
        (lambda d: {**d, 'indices': 1}, 1, 1),
        (lambda d: {**d, 'filter_cfg': {'filter_empty_gt': True}}, 2, 1),
        (lambda d: repeated(d, 5), 15, 8),
        (lambda d: joined(d, repeated(d, 2)), 9, 5),
        (lambda d: {'type': 'MultiImageMixDataset', 'dataset': joined(d, d), 'pipeline': []}, 6, 3),
        (lambda d: {'type': 'ClassBalancedDataset', 'oversample_thr': 1.0, 'dataset': d}, 5, 3),
    ],
)
def test_wrappers(dataset, make, samples, steps):
    cfg = config(make(dataset))
    before = copy.deepcopy(cfg.to_dict())
    assert batch_size.epoch_size(cfg, 1) == batch_size.EpochSize(samples, steps)
    assert cfg.to_dict() == before
    assert len(Runner.build_dataloader(cfg.train_dataloader, seed=0)) == steps


@pytest.mark.parametrize(
    ('loader', 'steps'),
    [
        ({'drop_last': True}, 4),
        ({'batch_sampler': {'type': 'AspectRatioBatchSampler'}}, 5),
        ({'batch_sampler': {'type': 'AspectRatioBatchSampler', 'drop_last': True}}, 4),
        ({'num_batch_per_epoch': 3}, 3),
    ],
)
def test_loaders(dataset, loader, steps):
    assert batch_size.epoch_size(config(repeated(dataset, 3), **loader), 1).steps == steps


def test_a_sampler_of_mmdetection(dataset):
    assert batch_size.epoch_size(config(dataset, sampler={'type': 'ClassAwareSampler'}), 1).steps == 2


@pytest.mark.parametrize(('world', 'last', 'steps'), [(2, False, 3), (4, False, 2), (4, True, 1)])
def test_processes_that_do_not_run_yet(dataset, world, last, steps):
    assert batch_size.epoch_size(config(repeated(dataset, 3), drop_last=last), world).steps == steps


def test_no_step(dataset):
    with refused('train-no-steps', samples=3, batch=4):
        batch_size.epoch_size(config(dataset, batch_size=4, drop_last=True), 1)
    with refused('train-no-steps', samples=0):
        batch_size.epoch_size(config({**dataset, 'filter_cfg': {'min_size': 50}}), 1)


@pytest.mark.parametrize(
    'change',
    [
        {'data_prefix': {'image': 'x'}},
        {'type': 'NoSuchDataset'},
        {'type': 'ClassBalancedDataset', 'oversample_thr': 1.0},
    ],
)
def test_data_that_cannot_be_built(dataset, change):
    with refused('train-data-unbuildable'):
        batch_size.epoch_size(config({**dataset, **change}), 1)


def test_a_sampler_that_does_not_know_a_wrapper(dataset):
    with refused('train-data-unbuildable', kind='AttributeError'):
        batch_size.epoch_size(config(joined(dataset, dataset), sampler={'type': 'ClassAwareSampler'}), 1)


def test_one_more_class_list(dataset, tmp_path):
    """MMEngine's own ConcatDataset insists on equal metainfo."""
    other = {**dataset, 'metainfo': {'classes': ('dog', 'cat')}}
    with refused('train-data-unbuildable', kind='ValueError'):
        batch_size.epoch_size(config({'type': 'mmengine.ConcatDataset', 'datasets': [dataset, other]}), 1)
    assert json.loads((tmp_path / 'instances.json').read_text())['images']
