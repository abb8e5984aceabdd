from __future__ import annotations

import copy

import pytest

from mmfinetune.config.lr import adapt_schedule, plan_lr
from tests.builders.errors import refused

GROUPS = {'backbone': 0.1, 'neck': 0.5, 'rpn_head': 1.0, 'roi_head': 1.0}


def make_cfg(
    lr: float = 0.002,
    batch_size: int = 2,
    accumulation: int | None = None,
    auto: dict | None = None,
    groups: dict | None = GROUPS,
) -> dict:
    wrapper = {'optimizer': {'type': 'SGD', 'lr': lr}}
    if groups is not None:
        wrapper['paramwise_cfg'] = {'custom_keys': {name: {'lr_mult': mult} for name, mult in groups.items()}}
    if accumulation is not None:
        wrapper['accumulative_counts'] = accumulation
    return {
        'optim_wrapper': wrapper,
        'train_dataloader': {'batch_size': batch_size},
        'auto_scale_lr': {'enable': True, 'base_batch_size': 2} if auto is None else auto,
    }


@pytest.mark.parametrize(
    ('gpus', 'accumulation', 'expected'),
    [
        (1, 1, 0.002),
        (2, 1, 0.004),
        (4, 1, 0.008),
        (8, 1, 0.016),
        (1, 4, 0.008),
        (2, 4, 0.016),
        (4, 4, 0.032),
        (8, 4, 0.064),
    ],
)
def test_linear_scaling_by_gpus_and_accumulation(gpus, accumulation, expected):
    plan = plan_lr(make_cfg(accumulation=accumulation), gpus)
    assert plan.lr == pytest.approx(expected, rel=1e-12)
    assert plan.groups == pytest.approx({k: expected * m for k, m in GROUPS.items()}, rel=1e-12)
    assert plan.source == f'0.002 x ({gpus} GPU x 2 images x {accumulation} accumulation) / 2'


@pytest.mark.parametrize(
    ('batch_size', 'base', 'expected'),
    [(2, 2, 0.002), (1, 2, 0.001), (4, 2, 0.004), (16, 2, 0.016), (2, 16, 0.00025), (3, 2, 0.003)],
)
def test_linear_scaling_by_batch_size(batch_size, base, expected):
    plan = plan_lr(make_cfg(batch_size=batch_size, auto={'enable': True, 'base_batch_size': base}), 1)
    assert plan.lr == pytest.approx(expected, rel=1e-12)


def test_nothing_is_scaled_at_the_size_that_the_lr_is_for():
    # Exactly, not about: the log must show 0.002 and not 0.0020000000000000005.
    assert [plan_lr(make_cfg(), gpus).lr for gpus in (1, 2, 4)] == [0.002, 0.004, 0.008]


@pytest.mark.parametrize('scale', [True, False])
def test_lr_of_the_command_line_wins_and_is_never_scaled(scale):
    plan = plan_lr(make_cfg(), 8, lr=0.005, scale=scale)
    assert (plan.lr, plan.source) == (0.005, '--lr')
    assert plan.groups == pytest.approx({k: 0.005 * m for k, m in GROUPS.items()})


def test_lr_zero_on_the_command_line_is_a_value():
    assert plan_lr(make_cfg(), 1, lr=0.0).lr == 0.0


def test_no_scaling_on_request():
    plan = plan_lr(make_cfg(), 8, scale=False)
    assert plan.lr == 0.002
    assert '--no-scale-lr' in plan.source


@pytest.mark.parametrize(
    'auto', [{'enable': False, 'base_batch_size': 2}, {'base_batch_size': 2}, {}, {'enable': False}]
)
def test_no_scaling_where_the_config_has_it_off(auto):
    plan = plan_lr(make_cfg(auto=auto), 8)
    assert plan.lr == 0.002
    assert 'auto_scale_lr is off' in plan.source


@pytest.mark.parametrize('base', [0, -2, None, 'two', 2.5])
def test_bad_base_batch_size(base):
    with refused('lr-base-batch-size', base=base):
        plan_lr(make_cfg(auto={'enable': True, 'base_batch_size': base}), 1)


def test_missing_base_batch_size():
    with refused('lr-base-batch-size', base=None):
        plan_lr(make_cfg(auto={'enable': True}), 1)


def test_a_bad_base_does_not_matter_where_it_is_not_used():
    cfg = make_cfg(auto={'enable': True, 'base_batch_size': 0})
    assert plan_lr(cfg, 4, lr=0.1).lr == 0.1
    assert plan_lr(cfg, 4, scale=False).lr == 0.002


def test_one_group_without_custom_keys():
    assert plan_lr(make_cfg(groups=None), 2).groups == {'all': 0.004}


def test_missing_lr_mult_is_one():
    cfg = make_cfg(groups=None)
    cfg['optim_wrapper']['paramwise_cfg'] = {'custom_keys': {'backbone': {'decay_mult': 0.0}}}
    assert plan_lr(cfg, 1).groups == {'backbone': 0.002}


@pytest.mark.parametrize(('gpus', 'expected'), [(1, 0.002), (2, 0.004), (4, 0.008)])
def test_main_config(voc_cfg, gpus, expected):
    plan = plan_lr(voc_cfg, gpus)
    assert plan.lr == expected
    assert plan.groups == pytest.approx({k: expected * m for k, m in GROUPS.items()})


# The table before training


def test_the_table_says_what_each_learning_rate_comes_from():
    assert plan_lr(make_cfg(accumulation=4), 2).lines() == [
        'Batch: 16 images an update (2 GPU x 2 x 4 accumulation); the config is for 2',
        'lr:    0.016 = 0.002 x (2 GPU x 2 images x 4 accumulation) / 2',
        '         lr/backbone   0.0016   = 0.1 x lr',
        '         lr/neck       0.008    = 0.5 x lr',
        '         lr/rpn_head   0.016    = 1 x lr',
        '         lr/roi_head   0.016    = 1 x lr',
    ]


def test_less_memory_by_accumulation_is_the_same_recipe_and_says_so():
    plan = plan_lr(make_cfg(batch_size=1, accumulation=2), 1)
    assert plan.lr == 0.002
    assert plan.lines()[0] == 'Batch: 2 images an update (1 GPU x 1 x 2 accumulation), as many as the config is for'


def test_no_word_on_the_config_where_nothing_is_scaled():
    assert (
        plan_lr(make_cfg(auto={'enable': False}), 2).lines()[0]
        == 'Batch: 4 images an update (2 GPU x 2 x 1 accumulation)'
    )


# Schedules


def with_schedule(*schedulers: dict, loop: dict | None = None, **options) -> dict:
    return {
        **make_cfg(**options),
        'param_scheduler': [dict(s) for s in schedulers],
        'train_cfg': dict(loop or {'max_epochs': 40}),
    }


WARMUP = {'type': 'LinearLR', 'start_factor': 0.001, 'by_epoch': False, 'begin': 0, 'end': 500}
STEPS = {'type': 'MultiStepLR', 'by_epoch': False, 'begin': 0, 'end': 12000, 'gamma': 0.1, 'milestones': [8000, 11000]}
EPOCHS = {'type': 'MultiStepLR', 'by_epoch': True, 'begin': 0, 'end': 40, 'milestones': [25, 35]}


@pytest.mark.parametrize('accumulation', [1, 4])
@pytest.mark.parametrize(
    ('gpus', 'warmup', 'milestones', 'iters'),
    [
        (1, 500, [8000, 11000], 12000),
        (2, 250, [4000, 5500], 6000),
        (4, 125, [2000, 2750], 3000),
        (8, 63, [1000, 1375], 1500),
    ],
)
def test_as_many_images_in_fewer_steps(gpus, accumulation, warmup, milestones, iters):
    # Schedulers go on with every step, updating or not, so that accumulation changes nothing.
    cfg = with_schedule(WARMUP, STEPS, accumulation=accumulation, loop={'max_iters': 12000, 'val_interval': 3000})
    lines = adapt_schedule(cfg, gpus)
    first, second = cfg['param_scheduler']
    assert (first['begin'], first['end'], first['start_factor']) == (0, warmup, 0.001)
    assert (second['milestones'], second['end'], second['gamma']) == (milestones, iters, 0.1)
    assert cfg['train_cfg'] == {'max_iters': iters, 'val_interval': 3000 // gpus}
    assert (lines == []) is (gpus == 1)
    if gpus == 4:
        assert lines == [
            'LinearLR.end: 500 -> 125 steps (/ 4)',
            'MultiStepLR.end: 12000 -> 3000 steps (/ 4)',
            'MultiStepLR.milestones: [8000, 11000] -> [2000, 2750] steps (/ 4)',
            'train_cfg.max_iters: 12000 -> 3000 steps (/ 4)',
            'train_cfg.val_interval: 3000 -> 750 steps (/ 4)',
        ]


def test_a_smaller_batch_takes_more_steps():
    cfg = with_schedule(WARMUP, batch_size=1)
    assert adapt_schedule(cfg, 1) == ['LinearLR.end: 500 -> 1000 steps (/ 0.5)']


def test_what_counts_epochs_stays():
    cfg = with_schedule(EPOCHS, {k: v for k, v in EPOCHS.items() if k != 'by_epoch'})
    assert adapt_schedule(cfg, 8) == []
    assert cfg['param_scheduler'][0] == EPOCHS and cfg['train_cfg'] == {'max_epochs': 40}


@pytest.mark.parametrize('end', [10**9, float('inf')])
def test_an_open_end_stays_open(end):
    cfg = with_schedule({**STEPS, 'end': end})
    adapt_schedule(cfg, 8)
    assert cfg['param_scheduler'][0]['end'] == end


def test_a_single_scheduler():
    cfg = {**with_schedule(), 'param_scheduler': dict(WARMUP)}
    adapt_schedule(cfg, 2)
    assert cfg['param_scheduler']['end'] == 250


@pytest.mark.parametrize('end', [2, 3, 8, 500])
def test_a_short_warmup_still_ends_at_the_whole_learning_rate(end):
    from mmengine.optim import LinearLR
    from torch import nn, optim

    cfg = with_schedule({**WARMUP, 'end': end})
    adapt_schedule(cfg, 8)
    options = {k: v for k, v in cfg['param_scheduler'][0].items() if k != 'type'}
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = LinearLR(optimizer, **options)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.001)
    for _ in range(options['end']):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1.0)


def test_a_decay_of_each_step_is_as_fast_per_image():
    from torch import nn, optim

    def after(images: int, gpus: int) -> float:
        from mmengine.optim import ExponentialLR

        cfg = with_schedule({'type': 'ExponentialLR', 'by_epoch': False, 'gamma': 0.99})
        adapt_schedule(cfg, gpus)
        options = {k: v for k, v in cfg['param_scheduler'][0].items() if k != 'type'}
        optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        scheduler = ExponentialLR(optimizer, **options)
        for _ in range(images // (2 * gpus)):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]['lr']

    assert after(160, gpus=4) == pytest.approx(after(160, gpus=1), rel=1e-12)


def test_the_schedule_follows_the_rule_alone():
    for cfg, scale in ((with_schedule(WARMUP), False), (with_schedule(WARMUP, auto={'enable': False}), True)):
        assert adapt_schedule(cfg, 8, scale) == [] and cfg['param_scheduler'] == [WARMUP]


def test_a_schedule_without_a_base_batch_size():
    with refused('lr-base-batch-size'):
        adapt_schedule(with_schedule(WARMUP, auto={'enable': True, 'base_batch_size': 0}), 2)


@pytest.mark.parametrize(('gpus', 'warmup'), [(1, 500), (2, 250), (4, 125), (8, 63)])
def test_warmup_of_the_main_config(voc_cfg, gpus, warmup):
    cfg = copy.deepcopy(voc_cfg)
    adapt_schedule(cfg, gpus)
    assert [s.end for s in cfg.param_scheduler] == [warmup, 40]
    assert cfg.param_scheduler[1].milestones == [25, 35]
