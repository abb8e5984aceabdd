"""Stop when the metric no longer improves."""

from __future__ import annotations

from mmdet.registry import HOOKS
from mmengine.hooks import EarlyStoppingHook


@HOOKS.register_module()
class EarlyStopHook(EarlyStoppingHook):
    """Stops when the metric has not improved for a while; goes on counting after ``--resume``.

    Args:
        monitor: Metric.
        min_delta: What counts as an improvement. MMEngine's default of 0.1 is a tenth of the whole
            scale of mAP; 0.001 is a tenth of a point of it.
        patience: Validations without improvement.
        **kwargs: See mmengine's ``EarlyStoppingHook``.
    """

    priority = 'LOW'  # before the checkpoint that keeps its state

    def __init__(
        self,
        monitor: str = 'coco/segm_mAP',
        min_delta: float = 0.001,
        patience: int = 10,
        rule: str = 'greater',
        **kwargs,
    ) -> None:
        super().__init__(monitor=monitor, min_delta=min_delta, patience=patience, rule=rule, **kwargs)

    def before_train(self, runner) -> None:
        state = runner.message_hub.runtime_info.get('early_stop')
        if state:
            self.best_score, self.wait_count = state
            reached = self.stopping_threshold is not None and self.rule_map[self.rule](
                self.best_score, self.stopping_threshold
            )
            runner.train_loop.stop_training = reached or self.wait_count >= self.patience

    def after_val_epoch(self, runner, metrics: dict) -> None:
        super().after_val_epoch(runner, metrics)
        # Plain numbers, which a checkpoint that is read as data may hold.
        runner.message_hub.update_info('early_stop', [float(self.best_score), self.wait_count])
