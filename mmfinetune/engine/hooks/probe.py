"""A few steps of a run, timed: what a forecast is made of."""

from __future__ import annotations

import time
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner


class Enough(BaseException):
    """The steps that a probe takes are done. No error: one at the first step would be explained."""


class ProbeHook(Hook):
    """Notes when each step begins and ends, and ends the training after some.

    Args:
        steps: How many.

    Attributes:
        begins, ends: Times of the steps in s; waiting for the batch is between an end and the next begin.
        started: When training began to load data.
    """

    priority = 'LOWEST'

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.started = 0.0

    def before_train(self, runner: Runner) -> None:
        self.started = time.perf_counter()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.begins.append(now())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.ends.append(now())
        if len(self.ends) >= self.steps:
            raise Enough


def now() -> float:
    """The time at which the GPU, too, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
