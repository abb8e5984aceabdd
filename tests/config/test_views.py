"""What a config says of its data: seen through all wrappers, however they are named and nested."""

from __future__ import annotations

import pytest
from mmengine.config import Config

from mmfinetune.config import views

PLAIN = {'type': 'CocoDataset', 'ann_file': 'a.json'}
OTHER = {'type': 'mmdet.CocoDataset', 'ann_file': 'b.json'}


def wrapped(kind: str, *datasets: dict) -> dict:
    return {'type': kind, 'datasets': list(datasets)} if 'Concat' in kind else {'type': kind, 'dataset': datasets[0]}


NESTED = wrapped('mmengine.RepeatDataset', wrapped('ConcatDataset', wrapped('ClassBalancedDataset', PLAIN), OTHER))


@pytest.mark.parametrize(
    ('dataset', 'places'),
    [
        (PLAIN, ['']),
        (wrapped('RepeatDataset', PLAIN), ['.dataset']),
        (wrapped('mmdet.MultiImageMixDataset', wrapped('RepeatDataset', PLAIN)), ['.dataset.dataset']),
        (wrapped('mmengine.ConcatDataset', PLAIN, OTHER), ['.datasets.0', '.datasets.1']),
        (NESTED, ['.dataset.datasets.0.dataset', '.dataset.datasets.1']),
    ],
)
def test_parts(dataset, places):
    cfg = Config({'train_dataloader': {'dataset': dataset}})
    assert [place for place, _ in views.parts_of(cfg, 'train')] == [f'train_dataloader.dataset{p}' for p in places]
    names = ['train'] if len(places) == 1 else ['train.1', 'train.2']
    assert list(views.dataset_configs(cfg)) == names
    assert {views.split_of(name) for name in names} == {'train'}
    assert views.innermost(cfg.train_dataloader.dataset) == PLAIN


def test_without_data():
    assert views.dataset_configs(Config({'val_dataloader': None})) == {}
    assert views.innermost(None) is None


METRIC = {'type': 'InstanceCocoMetric', 'ann_file': 'a.json'}


@pytest.mark.parametrize(
    'evaluator',
    [METRIC, [METRIC], {'type': 'Evaluator', 'metrics': METRIC}, {'type': 'Evaluator', 'metrics': [METRIC]}],
)
def test_evaluators(evaluator):
    assert views.evaluators(Config({'val_evaluator': evaluator}), 'val') == [METRIC]


def test_class_names_in_a_file(tmp_path):
    (tmp_path / 'names.txt').write_text('größe\nnut\n', encoding='utf-8')
    dataset = {**PLAIN, 'metainfo': {'classes': str(tmp_path / 'names.txt')}}
    assert views.class_names(Config({'train_dataloader': {'dataset': dataset}})) == ('größe', 'nut')
