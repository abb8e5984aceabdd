"""The order of hooks, which no place in a list decides."""

from __future__ import annotations

import itertools

import pytest
from mmdet.registry import HOOKS
from mmengine.runner.priority import get_priority

import mmfinetune.register  # noqa: F401
from mmfinetune.engine.hooks import PRIORITY


def test_order_is_strict():
    assert all(a < b for a, b in itertools.pairwise(PRIORITY.values()))


@pytest.mark.parametrize('name', PRIORITY)
def test_hook_has_its_place(name):
    assert get_priority(HOOKS.get(name).priority) == PRIORITY[name]


def test_hooks_that_configs_use_and_write_have_a_place(voc_cfg):
    drawing = {'TestPicturesHook', 'DistSamplerSeedHook', 'SafeCheckpointHook'}  # of MMEngine's order, or of none
    assert {hook.type for hook in voc_cfg.default_hooks.values()} - drawing <= PRIORITY.keys()
