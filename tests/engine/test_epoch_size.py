"""How long an epoch is: as the training loop has it, through wrappers, filters and samplers."""

from __future__ import annotations

import copy
import json

import pytest

import mmfinetune.register  # noqa: F401
from mmfinetune.config.schedule import Course
from mmfinetune.engine.runner import rehearse
from tests.builders.coco import CocoData
from tests.builders.errors import refused
from tests.builders.runs import forget_runs
from tests.builders.toy import make_cfg


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


def course(folder, dataset: dict, world: int = 1, **loader) -> Course:
    forget_runs()
    cfg = make_cfg(folder)
    cfg.default_scope = 'mmdet'
    loader = {'batch_size': 2, 'num_workers': 0, 'sampler': {'type': 'DefaultSampler', 'shuffle': True}, **loader}
    cfg.train_dataloader = {**loader, 'dataset': dataset}
    before = copy.deepcopy(cfg.to_dict())
    try:
        return rehearse(cfg, world)
    finally:
        assert cfg.to_dict() == before


def why(folder, dataset: dict, **loader) -> str:
    with refused('config-cannot-build') as caught:
        course(folder, dataset, **loader)
    return caught.value.problems[0].facts['kind']


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
def test_wrappers(tmp_path, dataset, make, samples, steps):
    found = course(tmp_path, make(dataset))
    assert (found.samples, found.steps, found.total) == (samples, steps, 4 * steps)


@pytest.mark.parametrize(
    ('loader', 'steps'),
    [
        ({'drop_last': True}, 4),
        ({'batch_sampler': {'type': 'AspectRatioBatchSampler'}}, 5),
        ({'batch_sampler': {'type': 'AspectRatioBatchSampler', 'drop_last': True}}, 4),
        ({'num_batch_per_epoch': 3}, 3),
    ],
)
def test_loaders(tmp_path, dataset, loader, steps):
    assert course(tmp_path, repeated(dataset, 3), **loader).steps == steps


def test_a_sampler_of_mmdetection(tmp_path, dataset):
    assert course(tmp_path, dataset, sampler={'type': 'ClassAwareSampler'}).steps == 2


@pytest.mark.parametrize(('world', 'last', 'steps'), [(2, False, 3), (4, False, 2), (4, True, 1)])
def test_processes_that_do_not_run_yet(tmp_path, dataset, world, last, steps):
    assert course(tmp_path, repeated(dataset, 3), world, drop_last=last).steps == steps


def test_no_step(tmp_path, dataset):
    with refused('train-no-steps', samples=3, batch=4):
        course(tmp_path, dataset, batch_size=4, drop_last=True)
    with refused('train-no-steps', samples=0):
        course(tmp_path, {**dataset, 'filter_cfg': {'min_size': 50}})


@pytest.mark.parametrize(
    ('change', 'kind'),
    [
        ({'data_prefix': {'image': 'x'}}, 'KeyError'),
        ({'type': 'NoSuchDataset'}, 'KeyError'),
        ({'type': 'ClassBalancedDataset', 'oversample_thr': 1.0}, 'TypeError'),
    ],
)
def test_data_that_cannot_be_built(tmp_path, dataset, change, kind):
    assert why(tmp_path, {**dataset, **change}) == kind


def test_a_sampler_that_does_not_know_a_wrapper(tmp_path, dataset):
    assert why(tmp_path, joined(dataset, dataset), sampler={'type': 'ClassAwareSampler'}) == 'AttributeError'


def test_one_more_class_list(tmp_path, dataset):
    """MMEngine's own ConcatDataset insists on equal metainfo."""
    other = {**dataset, 'metainfo': {'classes': ('dog', 'cat')}}
    assert why(tmp_path, {'type': 'mmengine.ConcatDataset', 'datasets': [dataset, other]}) == 'ValueError'
    assert json.loads((tmp_path / 'instances.json').read_text())['images']


@pytest.mark.parametrize(
    'loader', [{'num_workers': 0, 'persistent_workers': True}, {'num_workers': 0, 'prefetch_factor': 2}]
)
def test_arguments_of_a_loader_that_exclude_each_other(tmp_path, dataset, loader):
    assert why(tmp_path, dataset, **loader) == 'ValueError'
