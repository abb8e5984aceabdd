"""A runner for the test alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmfinetune.config.resolve import set_test_only

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmfinetune.weights.check import WeightCheck


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
    set_test_only(cfg)
    runner = FineTuningRunner.from_cfg(cfg)
    runner.start = weights
    return runner
