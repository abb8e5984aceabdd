"""Stop when the metric no longer improves."""

from __future__ import annotations

from mmdet.registry import HOOKS
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import Runner

from mmfinetune.engine.hooks import PRIORITY
from mmfinetune.engine.state import run_state, update_run_state


@HOOKS.register_module()
class EarlyStopHook(EarlyStoppingHook):
    """Stops when the metric has not improved for a while; continues to count after ``--resume``.

    Args:
        min_delta: What counts as an improvement. MMEngine's default of 0.1 is a tenth of the whole
            scale of mAP; 0.001 is a tenth of a point of it.
        patience: Validations without improvement before the run stops.
        monitor, rule, **kwargs: See MMEngine's ``EarlyStoppingHook``.
    """

    priority = PRIORITY['EarlyStopHook']

    def __init__(
        self,
        monitor: str = 'coco/segm_mAP',
        min_delta: float = 0.001,
        patience: int = 10,
        rule: str = 'greater',
        **kwargs,
    ) -> None:
        super().__init__(monitor=monitor, min_delta=min_delta, patience=patience, rule=rule, **kwargs)

    def before_train(self, runner: Runner) -> None:
        state = run_state(runner).early_stop
        if state:
            self.best_score, self.wait_count = state['best'], int(state['waited'])
            limit = self.stopping_threshold
            reached = limit is not None and self.rule_map[self.rule](self.best_score, limit)
            runner.train_loop.stop_training = reached or self.wait_count >= self.patience

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        super().after_val_epoch(runner, metrics or {})
        update_run_state(runner, early_stop={'best': float(self.best_score), 'waited': self.wait_count})
