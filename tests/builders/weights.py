"""Weights files of every origin, small or malicious, for the tests of reading and transferring them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmfinetune.weights.check import WeightCheck
from mmfinetune.weights.origins.torchvision import NAMES
from mmfinetune.weights.source import Source
from mmfinetune.weights.sources import open_source
from mmfinetune.weights.transfer import Plan, plan_transfer

# The heads that the main config re-initializes.
HEADS = {
    'roi_head.bbox_head.fc_cls': {'std': 0.01},
    'roi_head.bbox_head.fc_reg': {'std': 0.001},
    'roi_head.mask_head.conv_logits': {'std': 0.001},
}


class Evil:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def source_of(tensors: Mapping[str, torch.Tensor], **facts: Any) -> Source:
    """What a file ``a.pth`` with these tensors holds."""
    return Source(Path('a.pth'), 'mmdet', dict(tensors), **facts)


def plan_of(target: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], **weights_cfg: Any) -> Plan:
    """The plan for a file with these tensors, by these settings of ``weights``."""
    return plan_transfer(target, source_of(tensors), weights_cfg)


opened = functools.lru_cache(maxsize=1)(functools.partial(open_source, any_model=True))


def transfer(
    model: nn.Module, file: Path | Source, classes: Sequence[str] = (), seed: int = 0, **weights_cfg: Any
) -> Plan:
    """Give a model the weights of a file by these settings of ``weights``, if all of it fits."""
    source = opened(file) if isinstance(file, Path) else file
    target = model.state_dict()
    plan = plan_transfer(target, source, weights_cfg, classes, dict(model.named_buffers()))
    check = WeightCheck(source, plan, target, plan.problems)
    check.require_good()
    check.apply(model, seed)
    return plan


def torchvision_state(slots: int) -> dict[str, torch.Tensor]:
    """A small model under torchvision's names; conversion looks at names and rows only."""
    generator = torch.Generator().manual_seed(slots)
    state = {}
    for module, shape in (
        ('backbone.body.conv1', (4, 3, 7, 7)),
        ('backbone.fpn.inner_blocks.0.0', (4, 4, 1, 1)),
        ('rpn.head.conv.0.0', (4, 4, 3, 3)),
        ('roi_heads.box_head.fc6', (4, 4)),
        ('roi_heads.box_predictor.cls_score', (slots, 4)),
        ('roi_heads.box_predictor.bbox_pred', (4 * slots, 4)),
        ('roi_heads.mask_predictor.mask_fcn_logits', (slots, 4, 1, 1)),
    ):
        state[f'{module}.weight'] = torch.randn(shape, generator=generator)
        if 'body' not in module:
            state[f'{module}.bias'] = torch.randn(shape[0], generator=generator)
    for name in ('weight', 'bias', 'running_mean'):
        state[f'backbone.body.bn1.{name}'] = torch.randn(4, generator=generator)
    state['backbone.body.bn1.running_var'] = torch.rand(4, generator=generator) + 0.1
    return state


def mmdet_state(classes: int = 80) -> dict[str, torch.Tensor]:
    """The same small model under MMDetection's names."""
    converted = {}
    for key, value in torchvision_state(classes + 1).items():
        for theirs, ours in NAMES.items():
            if key.startswith(theirs):
                converted[ours + key[len(theirs) :]] = value
                break
    drop = {'roi_head.bbox_head.fc_reg.': 4, 'roi_head.mask_head.conv_logits.': 1}
    for prefix, rows in drop.items():
        for end in ('weight', 'bias'):
            converted[prefix + end] = converted[prefix + end][rows:].clone()
    return converted


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert set(left) == set(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def same_source(left: Source, right: Source) -> None:
    """Two sources that mean the same, wherever they are."""
    same(left.tensors, right.tensors)
    same(left.extra, right.extra)
    for name in ('origin', 'classes', 'style', 'mean', 'std', 'rgb'):
        assert getattr(left, name) == getattr(right, name), name
    assert [(n.code, str(n)) for n in left.notes] == [(n.code, str(n)) for n in right.notes]


def only(*keys: str) -> dict[str, torch.Tensor]:
    """A state dict of these keys alone."""
    return {k: torch.zeros(1) for k in keys}


def without(state: Mapping[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    """A state dict without the keys that hold one of these parts."""
    return {k: v for k, v in state.items() if not any(p in k for p in parts)}
