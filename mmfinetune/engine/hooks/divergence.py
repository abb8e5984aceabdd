"""Warns of a run that diverges."""

from __future__ import annotations

import math
import statistics
from collections import deque

from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from mmfinetune.engine.hooks import PRIORITY, loss_of, warn
from mmfinetune.utils.errors import Message

CAUSES = (
    'a learning rate too high for this batch size (try --lr at a tenth); '
    'empty boxes or masks, or labels beyond the classes (tools/check_dataset.py); '
    'fp16 overflow (try --amp bf16, or none)'
)


@HOOKS.register_module()
class DivergenceHook(Hook):
    """Warns once where the loss is far above its running median.

    Args:
        factor: Warn where the loss exceeds this times the median of the last ``window`` steps.
        window: Number of steps; there is no warning before half of them are done.
    """

    priority = PRIORITY['DivergenceHook']

    def __init__(self, factor: float = 10.0, window: int = 100) -> None:
        self.factor = factor
        self.window = window
        self._recent: deque[float] = deque(maxlen=window)
        self._warned = False

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        value = loss_of(outputs)
        if self._warned or value is None or not math.isfinite(value):
            return
        median = statistics.median(self._recent) if len(self._recent) >= self.window // 2 else math.inf
        if value > self.factor * median > 0:
            self._warned = True
            facts = {'step': runner.iter + 1, 'loss': value, 'times': value / median, 'steps': len(self._recent)}
            facts['lr'] = max(group['lr'] for group in runner.optim_wrapper.optimizer.param_groups)
            warn(Message('run-diverging', causes=CAUSES, **facts))
        self._recent.append(value)
