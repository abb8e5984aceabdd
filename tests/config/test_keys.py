"""Data settings that would crash a run or falsify its numbers."""

from __future__ import annotations

import pytest
from mmengine.config import Config

import mmfinetune.register  # noqa: F401
from mmfinetune.config import keys
from tests.builders.errors import codes

DATASET = {'type': 'CocoDataset', 'ann_file': 'a.json'}
METRIC = {'type': 'CocoMetric', 'ann_file': 'a.json'}


@pytest.mark.parametrize(
    ('changes', 'code', 'key'),
    [
        ({'metainfo': {'classes': 'nut'}}, 'config-classes-text', 'metainfo.classes'),
        ({'metainfo': {'classes': {'nut': 1}}}, 'config-classes', 'metainfo.classes'),
        ({'metainfo': {'classes': (1, 2)}}, 'config-classes', 'metainfo.classes'),
        ({'metainfo': ('nut',)}, 'config-not-a-dict', 'metainfo'),
        ({'data_prefix': 'images/'}, 'config-not-a-dict', 'data_prefix'),
        ({'ann_file': ['a.json', 'b.json']}, 'config-list-of-files', 'ann_file'),
        ({'data_root': ['a', 'b']}, 'config-list-of-files', 'data_root'),
        ({'ann_file': 3}, 'config-not-text', 'ann_file'),
        ({'data_prefix': {'img': 3}}, 'config-not-text', 'data_prefix.img'),
        ({'filter_cfg': {'min_size': 'abc'}}, 'config-not-a-number', 'filter_cfg.min_size'),
    ],
)
def test_dataset(changes, code, key):
    inner = {**DATASET, **changes}
    for dataset, place in (
        (inner, ''),
        (
            {'type': 'ConcatDataset', 'datasets': [DATASET, {'type': 'RepeatDataset', 'dataset': inner}]},
            '.datasets.1.dataset',
        ),
    ):
        [problem] = keys.check_data(Config({'train_dataloader': {'dataset': dataset}}))
        assert (problem.code, problem.facts['key']) == (code, f'train_dataloader.dataset{place}.{key}')


def test_dataset_without_type():
    assert codes(keys.check_data(Config({'train_dataloader': {'dataset': {'ann_file': 'a.json'}}}))) == [
        'config-no-type'
    ]


@pytest.mark.parametrize(
    ('loader', 'found'),
    [
        ({}, []),
        ({'sampler': {'type': 'DefaultSampler', 'shuffle': False}, 'drop_last': False}, []),
        ({'sampler': {'type': 'ClassAwareSampler'}}, ['config-eval-sampler']),
        ({'drop_last': True}, ['config-eval-part']),
        ({'num_batch_per_epoch': 3}, ['config-eval-part']),
        ({'dataset': {**DATASET, 'indices': 2}}, ['config-eval-indices']),
    ],
)
def test_evaluation(loader, found):
    loader = {'dataset': DATASET, **loader}
    for split in ('val', 'test'):
        cfg = Config({f'{split}_dataloader': loader, f'{split}_evaluator': METRIC})
        assert codes(keys.check_data(cfg)) == found
    # Training may do all of that.
    assert keys.check_data(Config({'train_dataloader': loader})) == []


@pytest.mark.parametrize(
    ('cfg', 'code', 'key'),
    [
        ({'optim_wrapper': {'optimizer': {'momentum': -1}}}, 'config-not-a-number', 'optim_wrapper.optimizer.momentum'),
        ({'optim_wrapper': {'optimizer': {'lr': None}}}, 'config-not-a-number', 'optim_wrapper.optimizer.lr'),
        (
            {'optim_wrapper': {'clip_grad': {'max_norm': 'a'}}},
            'config-not-positive',
            'optim_wrapper.clip_grad.max_norm',
        ),
        ({'optim_wrapper': {'clip_grad': {'max_norm': 0}}}, 'config-not-positive', 'optim_wrapper.clip_grad.max_norm'),
        ({'train_cfg': {'val_begin': -1}}, 'config-not-whole', 'train_cfg.val_begin'),
        (
            {'optim_wrapper': {'paramwise_cfg': {'custom_keys': {'backbone': {'lr_mult': float('nan')}}}}},
            'config-not-a-number',
            'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult',
        ),
        ({'model': {'test_cfg': {'rcnn': {'score_thr': 'a'}}}}, 'config-not-a-number', 'model.test_cfg.rcnn.score_thr'),
        (
            {'model': {'test_cfg': {'rcnn': {'max_per_img': 1.5}}}},
            'config-not-whole',
            'model.test_cfg.rcnn.max_per_img',
        ),
        ({'train_cfg': {'max_epochs': True}}, 'config-not-whole', 'train_cfg.max_epochs'),
        ({'default_hooks': {'logger': {'alpha': [1.0, float('nan')]}}}, 'config-nan', 'default_hooks.logger.alpha.1'),
        ({'weights': {'reinit': {'roi_head': 'abc'}}}, 'config-not-a-dict', 'weights.reinit.roi_head'),
        ({'work_dir': None}, 'config-not-text', 'work_dir'),
        ({'work_dir': ''}, 'config-not-text', 'work_dir'),
        ({'log_level': 'LOUD'}, 'config-choice', 'log_level'),
    ],
)
def test_values(cfg, code, key):
    [problem] = keys.check_values(Config(cfg))
    assert (problem.code, problem.facts['key']) == (code, key)


def test_values_that_may_be():
    assert (
        keys.check_values(
            Config(
                {
                    'optim_wrapper': {'optimizer': {'lr': 0, 'momentum': 0.0}, 'clip_grad': None},
                    'model': {'test_cfg': {'rcnn': {'score_thr': 0.0, 'max_per_img': -1}}},
                    'default_hooks': {'checkpoint': {'every_n_iters': None}},
                    'log_level': 'ERROR',
                }
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ('cfg', 'keys_of_text'),
    [
        ({'train_dataloader': {'num_workers': 'many', 'dataset': DATASET}}, ['train_dataloader.num_workers']),
        ({'val_evaluator': {**METRIC, 'iou_thrs': 'abc', 'metric': 'segm'}}, ['val_evaluator.iou_thrs']),
        ({'val_evaluator': {**METRIC, 'iou_thrs': [0.5], 'outfile_prefix': 'a'}}, []),
    ],
)
def test_text_where_numbers_are_due(cfg, keys_of_text):
    found = keys.check_keys(Config(cfg))
    assert [(problem.code, problem.facts['key']) for problem in found] == [('config-text', key) for key in keys_of_text]
