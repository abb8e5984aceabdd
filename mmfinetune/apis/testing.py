"""A runner for the test alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.utils.dist import bare_model
from mmfinetune.weights import check, transfer

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner


def test_runner(cfg: Config, file: Path) -> Runner:
    """A runner for the test alone, the model loaded in full from a checkpoint."""
    # Before the Runner, which begins with a log file.
    check.check(cfg, file, {}).require_good()
    runner = bare_runner(cfg, None)
    model = bare_model(runner)
    transfer.transfer(model, file)
    return runner


def bare_runner(cfg: Config, recipe: Any) -> Runner:
    """A runner without training and validation."""
    from mmengine.runner import Runner

    cfg.resume, cfg.load_from = False, None
    cfg.weights = recipe
    for key in (
        'train_dataloader',
        'train_cfg',
        'optim_wrapper',
        'param_scheduler',
        'val_dataloader',
        'val_cfg',
        'val_evaluator',
        'auto_scale_lr',
    ):
        cfg.pop(key, None)
    return Runner.from_cfg(cfg)
