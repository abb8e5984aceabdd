from __future__ import annotations

import pytest

from mmfinetune.errors import UserError
from mmfinetune.lr import plan_lr, scaled_lr

GROUPS = {'backbone': 0.1, 'neck': 0.5, 'rpn_head': 1.0, 'roi_head': 1.0}


def make_cfg(lr: float = 0.002, batch_size: int = 2, accumulation: int | None = None,
             auto: dict | None = None, groups: dict | None = GROUPS) -> dict:
    wrapper = {'optimizer': {'type': 'SGD', 'lr': lr}}
    if groups is not None:
        wrapper['paramwise_cfg'] = {
            'custom_keys': {name: {'lr_mult': mult} for name, mult in groups.items()}}
    if accumulation is not None:
        wrapper['accumulative_counts'] = accumulation
    return {'optim_wrapper': wrapper, 'train_dataloader': {'batch_size': batch_size},
            'auto_scale_lr': {'enable': True, 'base_batch_size': 2} if auto is None else auto}


@pytest.mark.parametrize(('gpus', 'accumulation', 'expected'), [
    (1, 1, 0.002), (2, 1, 0.004), (4, 1, 0.008), (8, 1, 0.016),
    (1, 4, 0.008), (2, 4, 0.016), (4, 4, 0.032), (8, 4, 0.064)])
def test_linear_scaling_by_gpus_and_accumulation(gpus, accumulation, expected):
    plan = plan_lr(make_cfg(accumulation=accumulation), gpus)
    assert plan.lr == pytest.approx(expected, rel=1e-12)
    assert plan.groups == pytest.approx({k: expected * m for k, m in GROUPS.items()}, rel=1e-12)
    assert plan.source == f'0.002 x ({gpus} GPU x 2 images x {accumulation} accumulation) / 2'


@pytest.mark.parametrize(('batch_size', 'base', 'expected'), [
    (2, 2, 0.002), (1, 2, 0.001), (4, 2, 0.004), (16, 2, 0.016), (2, 16, 0.00025), (3, 2, 0.003)])
def test_linear_scaling_by_batch_size(batch_size, base, expected):
    plan = plan_lr(make_cfg(batch_size=batch_size,
                            auto={'enable': True, 'base_batch_size': base}), 1)
    assert plan.lr == pytest.approx(expected, rel=1e-12)


def test_nothing_is_scaled_at_the_size_that_the_lr_is_for():
    # Exactly, not about: the log must show 0.002 and not 0.0020000000000000005.
    assert scaled_lr(0.002, 2, 1, 2) == 0.002
    assert scaled_lr(0.002, 2, 2, 2) == 0.004
    assert scaled_lr(0.002, 2, 4, 2) == 0.008


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


@pytest.mark.parametrize('auto', [{'enable': False, 'base_batch_size': 2}, {'base_batch_size': 2},
                                  {}, {'enable': False}])
def test_no_scaling_where_the_config_has_it_off(auto):
    plan = plan_lr(make_cfg(auto=auto), 8)
    assert plan.lr == 0.002
    assert 'auto_scale_lr is off' in plan.source


@pytest.mark.parametrize('base', [0, -2, None, 'two', 2.5])
def test_bad_base_batch_size(base):
    with pytest.raises(UserError, match=r'auto_scale_lr\.base_batch_size must be a positive'):
        plan_lr(make_cfg(auto={'enable': True, 'base_batch_size': base}), 1)


def test_missing_base_batch_size():
    with pytest.raises(UserError, match='base_batch_size'):
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
