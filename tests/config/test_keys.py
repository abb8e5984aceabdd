"""Data settings that would crash a run or falsify its numbers."""

from __future__ import annotations

import pytest
from mmengine.config import Config

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
