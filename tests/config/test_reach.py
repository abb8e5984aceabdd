"""Helper variables that a child or the command line changes too late are refused, with the place that would count."""

from __future__ import annotations

import pytest

from mmfinetune.config import load
from tests.builders.errors import refused

BASE = """
data_root = 'data/'
batch_size = 2
scale = (64, 64)
train_pipeline = [dict(type='LoadImage'), dict(type='Resize', scale=scale), dict(type='PackDetInputs')]
dataset = dict(type='CocoDataset', data_root=data_root)
train_dataloader = dict(
    batch_size=batch_size, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='a.json', pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='b.json', pipeline=train_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='InstanceCocoMetric', ann_file=data_root + 'b.json')
test_evaluator = val_evaluator
custom_imports = dict(imports=['mmfinetune.register'], allow_failed_imports=False)
default_scope = 'mmdet'
model = dict(type='MaskRCNN')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='ExactTrainLoop', max_epochs=1)
work_dir = 'work_dirs/x'
"""
DATA_ROOTS = [f'{split}_dataloader.dataset.data_root' for split in ('train', 'val', 'test')]


@pytest.fixture
def read(tmp_path):
    """Loads a child of the base; with `middle` through another file."""

    def load_child(text: str, overrides=(), middle: str | None = None):
        (tmp_path / 'base.py').write_text(BASE)
        if middle is not None:
            (tmp_path / 'middle.py').write_text(f"_base_ = './base.py'\n{middle}")
        path = tmp_path / 'child.py'
        path.write_text(f"_base_ = ['./{'base' if middle is None else 'middle'}.py']\n{text}")
        return load.load(path, overrides)

    return load_child


@pytest.mark.parametrize(
    ('text', 'places'),
    [
        ("data_root = 'other/'", [*DATA_ROOTS, 'val_evaluator.ann_file', 'test_evaluator.ann_file']),
        ('batch_size = 8', ['train_dataloader.batch_size']),
        ('train_pipeline = []', [f'{split}_dataloader.dataset.pipeline' for split in ('train', 'val', 'test')]),
        ('_base_.train_pipeline[1].scale = (9, 9)', ['train_dataloader.dataset.pipeline']),
        ("_base_.train_pipeline.insert(1, dict(type='RandomFlip'))", ['train_dataloader.dataset.pipeline']),
        ("_base_.dataset.data_root = 'other/'", ['train_dataloader.dataset']),
        ('scale = (9, 9)', ['train_dataloader.dataset.pipeline.1.scale']),
        # Not a helper of the base, but the name of a setting.
        ('lr = 0.5', ['optim_wrapper.optimizer.lr']),
        ('max_epochs = 12', ['train_cfg.max_epochs']),
    ],
)
def test_a_value_that_comes_too_late(read, text, places):
    with refused('config-wrong-settings') as caught:
        read(text)
    [problem] = caught.value.problems
    assert problem.code == 'config-no-effect'
    assert problem.facts['line'] == 2
    assert set(places) <= set(problem.facts['places'].split(', '))


@pytest.mark.parametrize(
    'text',
    [
        # Used by the file itself.
        "data_root = 'other/'\ntrain_dataloader = dict(dataset=dict(data_root=data_root))",
        'train_pipeline = [*_base_.train_pipeline]\ntrain_dataloader = dict(dataset=dict(pipeline=train_pipeline))',
        '_base_.train_pipeline[1].scale = (9, 9)\n'
        'train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))',
        # Changed where it counts.
        '_base_.train_dataloader.dataset.pipeline[1].scale = (9, 9)',
        # The same value, or the setting has it.
        "data_root = 'data/'",
        'lr = 0.01',
        'batch_size = 8\ntrain_dataloader = dict(batch_size=8)',
        # The place is gone.
        "batch_size = 8\ntrain_dataloader = dict(_delete_=True, dataset=dict(type='CocoDataset', ann_file='a.json'))",
        # Nothing that a run reads.
        "author = 'me'\n_private = 3",
    ],
)
def test_a_value_that_counts_or_harms_nothing(read, text):
    read(text)


@pytest.mark.parametrize('use', ['{{_base_.batch_size}}', '_base_.batch_size'])
def test_a_value_that_a_grandchild_uses(read, use):
    cfg = read(f'train_dataloader = dict(batch_size={use})', middle='batch_size = 6')
    assert cfg.train_dataloader.batch_size == 6


def test_a_value_of_the_file_between(read):
    with refused('config-wrong-settings') as caught:
        read('', middle='batch_size = 6')
    assert [(p.code, p.facts['path'].name) for p in caught.value.problems] == [('config-no-effect', 'middle.py')]


def test_overrides_of_helpers(read):
    with refused('config-wrong-settings') as caught:
        read('', ['data_root=x', 'train_pipeline.1.scale=(1,2)', 'dataset.data_root=y'])
    found = {p.facts['key']: p.facts['places'].split(', ') for p in caught.value.problems}
    assert {p.code for p in caught.value.problems} == {'override-no-effect'}
    assert set(DATA_ROOTS) <= set(found['data_root'])
    assert 'train_dataloader.dataset.pipeline.1.scale' in found['train_pipeline.1.scale']
    assert found['dataset.data_root'] == DATA_ROOTS
    # What is said works.
    overrides = [f'{place}=y' for place in DATA_ROOTS]
    assert read('', overrides).test_dataloader.dataset.data_root == 'y'


def test_bases_of_packages_are_read(tmp_path):
    path = tmp_path / 'child.py'
    path.write_text("_base_ = ['mmdet::_base_/schedules/schedule_1x.py']\n")
    from mmfinetune.config import reach

    assert [source.path.name for source in reach.read_sources(path)] == ['schedule_1x.py', 'child.py']
