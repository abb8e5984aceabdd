"""A runner for the test alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmfinetune.weights.check import WeightCheck

_OF_TRAINING = (
    'train_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'val_dataloader',
    'val_cfg',
    'val_evaluator',
    'auto_scale_lr',
)


def test_runner(cfg: Config, weights: WeightCheck) -> Runner:
    """A runner without training and validation, its model with the given weights.

    Args:
        cfg: Changed in place.
        weights: A checkpoint, or what training would start from.

    Raises:
        UserError: The weights do not fit; there is no log file then.
    """
    from mmfinetune.engine.runner import FineTuningRunner

    weights.require_good()
    cfg.resume, cfg.load_from = False, None
    for key in _OF_TRAINING:
        cfg.pop(key, None)
    runner = FineTuningRunner.from_cfg(cfg)
    runner.start = weights
    return runner
