"""The warning of a run that diverges."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mmfinetune.engine.hooks import divergence
from mmfinetune.utils.errors import Message


def feed(losses: list[float], monkeypatch) -> list[Message]:
    said: list[Message] = []
    monkeypatch.setattr(divergence, 'warn', said.append)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    runner = SimpleNamespace(iter=0, optim_wrapper=SimpleNamespace(optimizer=optimizer))
    hook = divergence.DivergenceHook()
    for loss in losses:
        hook.after_train_iter(runner, runner.iter, outputs={} if loss is None else {'loss': torch.tensor(loss)})
        runner.iter += 1
    return said


def test_divergence_is_told_once_with_its_causes(monkeypatch):
    (message,) = feed([1.0] * 60 + [None, 9.9, 11.0, 12.0] + [50.0] * 200, monkeypatch)
    facts = {name: message.facts[name] for name in ('step', 'loss', 'times', 'steps', 'lr')}
    assert (message.code, facts) == (
        'run-diverging',
        {'step': 63, 'loss': 11.0, 'times': 11.0, 'steps': 61, 'lr': 0.02},
    )
    assert 'learning rate' in str(message) and 'check_dataset.py' in str(message)


@pytest.mark.parametrize(
    'losses',
    [
        [100.0] * 40 + [2000.0],  # too early to tell
        [1.0] * 60 + [9.0] * 60,  # high, but not ten times
        [2.0 * 0.99**i for i in range(500)],
        [1.0] * 99 + [5.0, 0.1] * 50,
        [1.0, math.nan] * 60,
    ],
)
def test_no_false_alarm(monkeypatch, losses):
    assert feed(losses, monkeypatch) == []
