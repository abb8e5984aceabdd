"""Hooks: weight transfer, learning rate of each group, pictures of the test."""

from __future__ import annotations

from pathlib import Path

import mmcv
from mmdet.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper

from mmfinetune import data, weights
from mmfinetune.transfer import transfer


@HOOKS.register_module()
class WeightTransferHook(Hook):
    """Carries out the config's ``weights`` once, before training or a first test.

    A hook and not ``init_cfg``, since children's ``init_weights`` run after their parent's and
    would draw over it, and not ``load_from``, which only warns of tensors that do not fit.
    Nothing happens where a checkpoint is resumed or loaded.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._done = False

    def _transfer(self, runner) -> None:
        recipe = dict(runner.cfg.get('weights') or {})
        if self._done or not recipe or runner._resume or runner._load_from:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        path = weights.find(runner.cfg)
        for key in ('checkpoint', 'url', 'fallbacks'):
            recipe.pop(key, None)
        report = transfer(model, path, **recipe, classes=data.class_names(runner.cfg),
                          seed=runner.seed)
        print_log(f'{path}: {len(report.loaded)} tensors loaded, {len(report.remapped)} remapped, '
                  f'{len(report.reinit)} re-initialised ({", ".join(recipe.get("reinit") or {})}), '
                  f'{len(report.kept)} outside it, {len(report.dropped) + len(report.ignored)} '
                  'of the file left over', logger='current')
        self._done = True

    def before_train(self, runner) -> None:
        self._transfer(runner)

    def before_val(self, runner) -> None:
        self._transfer(runner)

    def before_test(self, runner) -> None:
        self._transfer(runner)


@HOOKS.register_module()
class GroupLrHook(Hook):
    """Logs ``lr/<group>`` for each named param group; MMEngine logs the first group's only."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # Not the wrapper's own list: it ends with a group that only carries the base lr.
        for i, group in enumerate(runner.optim_wrapper.optimizer.param_groups):
            name = group.get('name', f'group{i}')
            runner.message_hub.update_scalar(f'train/lr/{name}', group['lr'])


@HOOKS.register_module()
class TestPicturesHook(Hook):
    """Draws the first test images, ground truth beside prediction, to ``<work_dir>/figures``.

    Args:
        num_images: How many; 0 draws none.
        score_thr: Predictions below this score are not drawn.
    """

    def __init__(self, num_images: int = 8, score_thr: float = 0.3) -> None:
        self.num_images = num_images
        self.score_thr = score_thr
        self._drawn = 0

    def before_test(self, runner) -> None:
        self._drawn = 0

    @master_only
    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for sample in (outputs or [])[:max(0, self.num_images - self._drawn)]:
            image = mmcv.imread(sample.img_path, channel_order='rgb')
            name = Path(sample.img_path).stem
            out_file = Path(runner.work_dir) / 'figures' / f'{name}.png'
            runner.visualizer.add_datasample(
                name, image, data_sample=sample, pred_score_thr=self.score_thr,
                out_file=str(out_file))
            self._drawn += 1
