from __future__ import annotations

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmfinetune.engine.optim import LayeredOptimWrapperConstructor
from tests.builders.errors import refused

EXPECTED = {'backbone': 0.0002, 'neck': 0.001, 'rpn_head': 0.002, 'roi_head': 0.002}
SGD = {'type': 'SGD', 'lr': 1.0, 'momentum': 0.9, 'weight_decay': 0.1}


@pytest.fixture(scope='module')
def model(build_model):
    return build_model()


@pytest.fixture(scope='module')
def wrapper(model, voc_cfg):
    # Asked for `.optimizer.param_groups` below: the wrapper's own list ends with a group that only
    # carries the base lr.
    return build_optim_wrapper(model, copy.deepcopy(voc_cfg.optim_wrapper))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        self.body_guard = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(1))


def groups_of(keys: dict, model: nn.Module | None = None, optimizer: dict = SGD) -> dict[str, dict]:
    cfg = {'optimizer': dict(optimizer)}
    build = LayeredOptimWrapperConstructor(cfg, {'custom_keys': keys} if keys else None)
    groups = build(model or Small()).optimizer.param_groups
    names = [g['name'] for g in groups]
    assert len(set(names)) == len(names)
    return {g['name']: g for g in groups}


# The real model


def test_exactly_four_groups_with_their_learning_rates(wrapper):
    assert [g['name'] for g in wrapper.optimizer.param_groups] == list(EXPECTED)
    groups = wrapper.optimizer.param_groups
    assert {g['name']: g['lr'] for g in groups} == pytest.approx(EXPECTED, rel=1e-12)
    for group in groups:
        assert group['momentum'] == 0.9
        assert group['weight_decay'] == 1e-4


def test_optimizer_is_the_configs(wrapper):
    assert type(wrapper.optimizer) is torch.optim.SGD
    assert type(wrapper).__name__ == 'OptimWrapper'


def test_every_trainable_parameter_is_in_the_group_of_its_module(model, wrapper):
    where = {id(p): g['name'] for g in wrapper.optimizer.param_groups for p in g['params']}
    assert sum(len(g['params']) for g in wrapper.optimizer.param_groups) == len(where)
    for name, param in model.named_parameters():
        expected = name.partition('.')[0] if param.requires_grad else None
        assert where.get(id(param)) == expected, name


def test_frozen_parameters_are_left_out(model, wrapper):
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    # frozen_stages=1: the stem and the first stage.
    assert {'backbone.conv1.weight', 'backbone.layer1.0.conv1.weight'} <= frozen
    assert all(n.startswith(('backbone.conv1', 'backbone.bn1', 'backbone.layer1')) for n in frozen)
    assert sum(len(g['params']) for g in wrapper.optimizer.param_groups) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_config_is_not_changed_by_building(model, voc_cfg):
    cfg = copy.deepcopy(voc_cfg.optim_wrapper)
    before = copy.deepcopy(cfg.to_dict())
    constructor = LayeredOptimWrapperConstructor(
        {k: v for k, v in cfg.items() if k not in ('constructor', 'paramwise_cfg')}, cfg.paramwise_cfg
    )
    first, second = constructor(model), constructor(model)
    assert [g['lr'] for g in first.param_groups] == [g['lr'] for g in second.param_groups]
    assert cfg.to_dict() == before


def test_clip_grad_and_accumulation_reach_the_wrapper(model, voc_cfg):
    cfg = copy.deepcopy(voc_cfg.optim_wrapper)
    cfg.update(clip_grad={'max_norm': 35, 'norm_type': 2}, accumulative_counts=4)
    wrapper = build_optim_wrapper(model, cfg)
    assert (wrapper._accumulative_counts, wrapper.clip_grad_kwargs['max_norm']) == (4, 35)


def test_unknown_key_names_the_parts_of_the_model(model, voc_cfg):
    cfg = copy.deepcopy(voc_cfg.optim_wrapper)
    cfg.paramwise_cfg.custom_keys.bakcbone = {'lr_mult': 0.1}
    cfg.paramwise_cfg.custom_keys['roi_head.no'] = {'lr_mult': 0.1}
    with refused('optim-unknown-parts', parts='data_preprocessor, backbone, neck, rpn_head, roi_head') as caught:
        build_optim_wrapper(model, cfg)
    assert caught.value.problems == ['custom_keys.bakcbone', 'custom_keys.roi_head.no']


# A small model


def test_rest_takes_what_no_key_covers():
    groups = groups_of({'body': {'lr_mult': 0.5}})
    assert {n: g['lr'] for n, g in groups.items()} == {'body': 0.5, 'rest': 1.0}
    # `body` is a module, not the beginning of a name.
    assert len(groups['body']['params']) == 4
    assert len(groups['rest']['params']) == 3


def test_longest_prefix_wins_whatever_the_order():
    for keys in (['body', 'body.1'], ['body.1', 'body']):
        groups = groups_of({k: {'lr_mult': len(k)} for k in keys})
        assert list(groups) == [*keys, 'rest']
        assert {n: len(g['params']) for n, g in groups.items()} == {'body': 2, 'body.1': 2, 'rest': 3}


def test_key_may_be_a_parameter():
    groups = groups_of({'scale': {'lr_mult': 0.1}})
    assert groups['scale']['params'][0].shape == (1,)
    assert groups['scale']['lr'] == 0.1


def test_no_keys_make_one_group():
    groups = groups_of({})
    assert list(groups) == ['rest']
    assert len(groups['rest']['params']) == 7


def test_weight_decay_of_each_group():
    groups = groups_of({'body': {'lr_mult': 1.0, 'decay_mult': 0.0}, 'scale': {'decay_mult': 0.5}})
    assert {n: g['weight_decay'] for n, g in groups.items()} == {'body': 0.0, 'scale': 0.05, 'rest': 0.1}
    assert groups['scale']['lr'] == 1.0


def test_optimizer_keeps_its_own_weight_decay_where_the_config_has_none():
    groups = groups_of({'body': {'lr_mult': 0.1}}, optimizer={'type': 'AdamW', 'lr': 0.001})
    assert {g['weight_decay'] for g in groups.values()} == {0.01}


def test_wholly_frozen_part_makes_no_group_and_no_error():
    model = Small()
    model.body.requires_grad_(False)
    assert list(groups_of({'body': {'lr_mult': 0.1}}, model)) == ['rest']


def test_each_group_moves_by_its_own_learning_rate():
    model = Small()
    model.body[0].bias.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapper = LayeredOptimWrapperConstructor(
        {'optimizer': {'type': 'SGD', 'lr': 0.5}},
        {'custom_keys': {'body': {'lr_mult': 0.1}, 'scale': {'lr_mult': 2.0}}},
    )(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    wrapper.step()
    for name, param in model.named_parameters():
        lr = {'body': 0.05, 'scale': 1.0}.get(name.partition('.')[0], 0.5)
        moved = lr if param.requires_grad else 0.0
        assert torch.allclose(before[name] - param, torch.tensor(moved), atol=1e-6), name


def test_parallel_wrapper_is_looked_through():
    inner = Small()
    outer = nn.Module()
    outer.module = inner
    assert set(groups_of({'body': {'lr_mult': 0.1}}, outer)) == {'body', 'rest'}


@pytest.mark.parametrize(
    ('paramwise', 'problem'),
    [
        ({'norm_decay_mult': 0.0}, 'paramwise_cfg.norm_decay_mult'),
        ({'custom_keys': {}, 'bias_lr_mult': 2.0}, 'paramwise_cfg.bias_lr_mult'),
        ({'custom_keys': {'body': {'lr_mul': 0.1}}}, 'paramwise_cfg.custom_keys.body.lr_mul'),
        ({'custom_keys': {'body': {'lr': 0.1}}}, 'paramwise_cfg.custom_keys.body.lr'),
    ],
)
def test_unsupported_settings(paramwise, problem):
    with refused('optim-unknown-settings') as caught:
        LayeredOptimWrapperConstructor({'optimizer': SGD}, paramwise)
    assert caught.value.problems == [problem]
