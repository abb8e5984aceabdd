"""Carry out the config's ``weights`` before training."""

from __future__ import annotations

from pathlib import Path

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.logging import print_log

from mmfinetune.config import views
from mmfinetune.engine.hooks.tensorboard import tensorboard_of
from mmfinetune.evaluation import tensorboard as curves
from mmfinetune.utils.dist import bare_model
from mmfinetune.weights import check, find
from mmfinetune.weights.sources import read_source
from mmfinetune.weights.transfer import plan, transfer


@HOOKS.register_module()
class WeightTransferHook(Hook):
    """Carries out the config's ``weights`` once, before training or a first test.

    A hook and not ``init_cfg``, since children's ``init_weights`` run after their parent's and
    would draw over it, and not ``load_from``, which only warns of tensors that do not fit.
    Nothing happens where a checkpoint is resumed or loaded. Where training starts, TensorBoard
    gets the report on the weights.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._done = False

    def _transfer(self, runner) -> Path | None:
        """The file, if the transfer was made now."""
        recipe = dict(runner.cfg.get('weights') or {})
        if self._done or not recipe or runner._resume or runner._load_from:
            return None
        model = bare_model(runner)
        path = find.find(runner.cfg)
        for key in ('checkpoint', 'url', 'fallbacks'):
            recipe.pop(key, None)
        report = transfer(model, path, **recipe, classes=views.class_names(runner.cfg), seed=runner.seed)
        print_log(
            f'{path}: {len(report.loaded)} tensors loaded, {len(report.remapped)} remapped, '
            f'{len(report.reinit)} re-initialised ({", ".join(recipe.get("reinit") or {})}), '
            f'{len(report.kept)} outside it, {len(report.dropped) + len(report.ignored)} '
            'of the file left over',
            logger='current',
        )
        self._done = True
        return path

    def before_train(self, runner) -> None:
        path, tensorboard = self._transfer(runner), tensorboard_of(runner)
        if path and tensorboard:
            tensorboard.add_text(curves.WEIGHTS, _weight_report(runner, path))

    def before_val(self, runner) -> None:
        self._transfer(runner)

    def before_test(self, runner) -> None:
        self._transfer(runner)


def _weight_report(runner, path: Path) -> str:
    """What ``--check-weights`` prints, of the model that is there."""
    recipe = runner.cfg['weights']
    model = bare_model(runner)
    target = model.state_dict()
    source = read_source(path, any_model=True)
    planned, class_map = plan(target, source, recipe, views.class_names(runner.cfg))
    return check.WeightCheck(
        path, find.verify_file(path), source, planned, class_map, target, [], recipe.get('into') or ''
    ).text()
