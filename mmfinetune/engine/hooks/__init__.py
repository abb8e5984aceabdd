"""Hooks, one a file. They sit by name in ``default_hooks``; their order is that of this table alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmfinetune.utils.extras import warn

__all__ = ['EXTRAS', 'PRIORITY', 'loss_of', 'warn']

# Lower comes first at each point of a run. MMEngine's own are here to show what lies between.
PRIORITY = {
    'NonFiniteHook': 0,  # takes the losses of a skipped step out of what the others see
    'RuntimeInfoHook': 10,  # puts them into the message hub
    'DivergenceHook': 20,
    'IterTimerHook': 50,  # estimates the hours left
    'TensorBoardHook': 55,  # logs them, and resumes the curves before the first record
    'LoggerHook': 60,  # writes the record
    'ParamSchedulerHook': 70,
    'EarlyStopHook': 80,  # notes its state
    'SafeCheckpointHook': 90,  # saves it
    'ConsoleHook': 92,  # shows which is the best
    'ResultsHook': 95,  # links the best checkpoint
}
# They only show what a run does; where one fails, the run continues.
EXTRAS = {'LoggerHook', 'TensorBoardHook', 'ConsoleHook', 'ResultsHook', 'TestPicturesHook', 'DetVisualizationHook'}


def loss_of(outputs: Mapping[str, Any] | None) -> float | None:
    """The loss among the outputs of a training step, if there is one."""
    loss = (outputs or {}).get('loss')
    return None if loss is None else torch.as_tensor(loss).item()
