"""Configs of earlier releases load, and mean what they meant."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from mmfinetune.config import load, old_names
from mmfinetune.config.keys import check_keys
from tests.builders.errors import codes, refused
from tests.builders.runs import CONFIGS

MAIN = CONFIGS / 'mask_rcnn_voc_pretrained.py'
FLAT = CONFIGS / 'mask_rcnn_voc_pretrained_simple.py'
# As the release before had it, word for word.
OLD_HOOKS = """
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=3,
                    save_best='coco/segm_mAP', rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    bad_numbers=dict(type='BadNumbersHook', nan_policy='stop'),
    visualization=dict(type='TestPicturesHook', num_images=8))
custom_hooks = [
    dict(type='WeightTransferHook'),
    dict(type='GroupLrHook'),
    dict(type='GradNormHook'),
    dict(type='BoardHook'),
    dict(type='BoardPicturesHook'),
    dict(type='ResultsHook'),
    dict(type='SaveValidatedHook'),
    dict(type='StopHook'),
]
vis_backends = [dict(type='LocalVisBackend'),
                dict(type='BoardBackend', save_dir=work_dir + '/tensorboard_logs')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
"""


def old_flat(folder: Path, hooks: str = OLD_HOOKS) -> Path:
    path = folder / 'old.py'
    path.write_text(FLAT.read_text() + hooks)
    return path


def child(folder: Path, text: str) -> Path:
    path = folder / 'child.py'
    path.write_text(f'_base_ = {str(FLAT)!r}\n{text}\n')
    return path


def test_old_flat_config_makes_the_same_run(tmp_path, capsys):
    old, new = load.load(old_flat(tmp_path)), load.load(FLAT)
    note = capsys.readouterr().err
    assert note.startswith('note: ') and all(name in note for name in ('BadNumbersHook', 'BoardBackend', 'GroupLrHook'))
    old, new = (cfg.to_dict() for cfg in (old, new))
    hooks = old['default_hooks'], new['default_hooks']
    assert hooks[0].pop('tensorboard') == {**hooks[1].pop('tensorboard'), 'pictures': 4}
    assert old == new


def test_new_config_has_no_note(capsys):
    load.load(FLAT)
    assert capsys.readouterr().err == ''


def test_overrides_have_old_names_too(tmp_path):
    options = ['nan_policy=skip', 'factor=5', 'window=50']
    for path in (FLAT, old_flat(tmp_path)):
        cfg = load.load(path, [f'default_hooks.bad_numbers.{option}' for option in options])
        assert 'bad_numbers' not in cfg.default_hooks
        assert cfg.default_hooks.nonfinite.to_dict() == {'type': 'NonFiniteHook', 'nan_policy': 'skip'}
        assert cfg.default_hooks.divergence.to_dict() == {'type': 'DivergenceHook', 'factor': 5, 'window': 50}


def test_child_with_old_settings(tmp_path):
    text = "default_hooks = dict(bad_numbers=dict(nan_policy='skip', max_skips=3, window=7))"
    cfg = load.load(child(tmp_path, text))
    assert cfg.default_hooks.nonfinite.to_dict() == {'type': 'NonFiniteHook', 'nan_policy': 'skip', 'max_skips': 3}
    assert cfg.default_hooks.divergence.window == 7


def test_child_without_the_old_guard(tmp_path):
    cfg = load.load(child(tmp_path, 'default_hooks = dict(bad_numbers=None)'))
    assert not {'bad_numbers', 'nonfinite', 'divergence'} & set(cfg.default_hooks)


def test_what_an_old_list_leaves_out_stays_out(tmp_path):
    own = "dict(type='EMAHook')"
    cfg = load.load(child(tmp_path, f"custom_hooks = [dict(type='WeightTransferHook'), {own}]"))
    assert not {'tensorboard', 'results'} & set(cfg.default_hooks)
    assert [hook.to_dict() for hook in cfg.custom_hooks] == [{'type': 'EMAHook'}]
    text = "custom_hooks = [dict(type='BoardHook'), dict(type='BoardPicturesHook', num_images=9, score_thr=0.5)]"
    cfg = load.load(child(tmp_path, text))
    assert cfg.default_hooks.tensorboard.to_dict() == {
        'type': 'TensorBoardHook',
        'lr': False,
        'grad_norm': False,
        'pictures': 9,
        'score_thr': 0.5,
    }


def test_own_hooks_replace_none_of_the_toolkits(tmp_path):
    cfg = load.load(child(tmp_path, "custom_hooks = [dict(type='EMAHook')]"))
    assert cfg.default_hooks.to_dict() == load.load(FLAT).default_hooks.to_dict()


@pytest.mark.parametrize('way', ['file', 'option'])
def test_none_removes_a_hook(tmp_path, way):
    names = ('results', 'tensorboard', 'timer')
    if way == 'file':
        cfg = load.load(child(tmp_path, f'default_hooks = dict({", ".join(f"{name}=None" for name in names)})'))
    else:
        cfg = load.load(FLAT, [f'default_hooks.{name}=None' for name in names])
    assert not {'results', 'tensorboard'} & set(cfg.default_hooks)
    # MMEngine adds its own ones where a config does not say None.
    assert cfg.default_hooks.timer is None


def test_every_name_of_the_table_is_known():
    from mmdet.registry import HOOKS
    from mmengine.registry import VISBACKENDS

    default = load.load(FLAT).default_hooks
    for name, plain in old_names._PLAIN.items():
        assert HOOKS.get(plain['type']) and default[name].type == plain['type'] and plain.keys() <= default[name].keys()
    assert all(HOOKS.get(kind) or VISBACKENDS.get(kind) for kind in old_names.TYPES.values())
    assert {entry[0] for entry in old_names.HOOKS.values() if entry} == old_names._PLAIN.keys()


# MMDetection 2.x


@pytest.mark.parametrize(
    'text',
    [
        'data = dict(samples_per_gpu=2, train=dict())',
        "optimizer = dict(type='SGD', lr=0.02)",
        'optimizer_config = dict(grad_clip=None)',
        "lr_config = dict(policy='step', step=[8, 11])",
        "runner = dict(type='EpochBasedRunner', max_epochs=12)",
        'total_epochs = 12',
        "evaluation = dict(metric=['bbox', 'segm'])",
        'checkpoint_config = dict(interval=1)',
        "log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook')])",
        "workflow = [('train', 1)]",
        "dist_params = dict(backend='nccl')",
        "resume_from = 'x.pth'",
        'seed = 3',
    ],
)
def test_settings_of_2x(tmp_path, text):
    path = tmp_path / 'mine.py'
    # Also where it does not register the toolkit, as a config of 2.x will not.
    for base in (f'_base_ = {str(MAIN)!r}\n', ''):
        path.write_text(base + text)
        with refused('config-of-2x') as caught:
            load.load(path)
        assert [(p.code, p.facts['key']) for p in caught.value.problems] == [('config-2x', text.split()[0])]


def test_helpers_may_have_names_of_2x(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        f"_base_ = {str(MAIN)!r}\noptimizer = dict(type='AdamW', lr=1e-4, _delete_=True)\n"
        'optim_wrapper = dict(optimizer=optimizer)\n'
    )
    assert load.load(path).optim_wrapper.optimizer.type == 'AdamW'


PIPELINE = "train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImage'), {}]))"


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ("train_dataloader = dict(dataset=dict(metainfo=dict(CLASSES=('a',))))", 'config-2x'),
        (PIPELINE.format("dict(type='DefaultFormatBundle')"), 'config-2x'),
        (PIPELINE.format("dict(type='Collect', keys=['img'])"), 'config-2x'),
        (PIPELINE.format("dict(type='ImageToTensor', keys=['img'])"), 'config-2x'),
        (PIPELINE.format("dict(type='MultiScaleFlipAug', transforms=[])"), 'config-2x'),
        (PIPELINE.format("dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1])"), 'config-normalized-twice'),
        ("custom_hooks = [dict(type='TextLoggerHook')]", 'config-2x'),
    ],
)
def test_spellings_of_2x_that_no_class_refuses(tmp_path, text, problem):
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {str(MAIN)!r}\n{text}')
    with refused('config-of-2x') as caught:
        load.load(path)
    assert codes(caught.value.problems) == [problem]


@pytest.mark.parametrize(
    ('place', 'value'),
    [
        ('train_dataloader.samples_per_gpu', 2),
        ('train_dataloader.workers_per_gpu', 2),
        ('train_dataloader.dataset.img_prefix', 'x'),
        ('train_dataloader.dataset.classes', ['a']),
        ('train_dataloader.dataset.pipeline.3.img_scale', (9, 9)),
        ('train_dataloader.dataset.pipeline.4.flip_ratio', 0.5),
        ('model.pretrained', 'torchvision://resnet50'),
        ('optim_wrapper.grad_clip', None),
        ('val_evaluator.interval', 1),
        ('train_cfg.rpn', {'debug': False}),
    ],
)
def test_arguments_of_2x(loaded, place, value):
    cfg = copy.deepcopy(loaded(MAIN.name))
    cfg.merge_from_dict({place: value})
    assert [(p.code, p.facts['key']) for p in check_keys(cfg)] == [('config-2x', place)]


@pytest.mark.parametrize('key', ['data.samples_per_gpu', 'optimizer.lr', 'total_epochs', 'runner.max_epochs'])
def test_overrides_of_2x(key):
    with refused('config-wrong-settings') as caught:
        load.load(MAIN, [f'{key}=1'])
    assert codes(caught.value.problems) == ['config-2x']
