"""Hooks: weight transfer, learning rates, gradient norm, and what else TensorBoard shows."""

from __future__ import annotations

from pathlib import Path

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop

from mmfinetune import board, checkpoint, data, weights
from mmfinetune.backends import board_of, validation_step
from mmfinetune.convert import read_source
from mmfinetune.ranks import bare_model
from mmfinetune.transfer import plan, transfer


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
        return path

    def before_train(self, runner) -> None:
        path, tensorboard = self._transfer(runner), board_of(runner)
        if path and tensorboard:
            tensorboard.add_text(board.WEIGHTS, _weight_report(runner, path))

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
    planned, class_map = plan(target, source, recipe, data.class_names(runner.cfg))
    return weights.WeightCheck(path, checkpoint.verify_file(path), source, planned, class_map,
                               target, [], recipe.get('into') or '').text()


@HOOKS.register_module()
class GroupLrHook(Hook):
    """Logs ``lr/<group>`` for each named param group; MMEngine logs the first group's only."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # Not the wrapper's own list: it ends with a group that only carries the base lr.
        for i, group in enumerate(runner.optim_wrapper.optimizer.param_groups):
            name = group.get('name', f'group{i}')
            runner.message_hub.update_scalar(f'train/lr/{name}', group['lr'])


@HOOKS.register_module()
class GradNormHook(Hook):
    """Logs ``grad_norm``, the 2-norm of all gradients, at each update of the parameters.

    MMEngine logs it only where it clips by norm, and there this hook does nothing. The norm is
    that of the gradients the update is made with: summed over an accumulation and averaged over
    processes, and without the loss scale of mixed precision. They are only read.
    """

    def __init__(self) -> None:
        self._handle = None

    def before_train(self, runner) -> None:
        wrapper = runner.optim_wrapper
        clips = getattr(wrapper, 'clip_grad_kwargs', None) and wrapper.grad_name == 'grad_norm'
        # An OptimWrapperDict has no optimizer of its own.
        optimizer = getattr(wrapper, 'optimizer', None)
        if not is_main_process() or clips or optimizer is None:
            return

        def log(optimizer: torch.optim.Optimizer, *_) -> None:
            grads = [param.grad for group in optimizer.param_groups for param in group['params']
                     if param.grad is not None]
            if not grads:
                return
            norm = torch.nn.utils.get_total_norm(grads)
            # Set by GradScaler for fused optimizers, which unscale, or skip, within their step.
            scale = getattr(optimizer, 'grad_scale', None)
            if scale is not None:
                norm = norm / scale
                if not torch.isfinite(norm):
                    return
            runner.message_hub.update_scalar('train/grad_norm', norm)

        self._handle = optimizer.register_step_pre_hook(log)

    def after_train(self, runner) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


@HOOKS.register_module()
class BoardHook(Hook):
    """Gives TensorBoard what MMEngine's logger leaves out, and resumes the curves with the run.

    That is the mean training loss of each epoch beside the validation loss, the hyperparameters
    and, for all backends, ``eta_hours``. Without a ``BoardBackend`` only the latter is left.
    """

    # IterTimerHook and LoggerHook come before and after it in each step.
    priority = 'NORMAL'

    def __init__(self) -> None:
        self._end = None

    def before_train(self, runner) -> None:
        tensorboard = board_of(runner)
        if tensorboard is None:
            return
        if runner._resume:
            tensorboard.resume(runner.iter, validation_step(runner))
        head, start, self._end = board.hparam_summaries(
            board.hparams_of(runner.cfg, runner.world_size, runner.seed))
        tensorboard.add_summaries(head, start)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if 'eta' in runner.message_hub.runtime_info:
            runner.message_hub.update_scalar('train/eta_hours',
                                             runner.message_hub.get_info('eta') / 3600)

    def after_train_epoch(self, runner) -> None:
        tensorboard = board_of(runner)
        if tensorboard is None or not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        # The history is saved in checkpoints, so that an epoch that was interrupted counts whole.
        losses = runner.message_hub.get_scalar('train/loss')
        tensorboard.add_scalars({board.EPOCH_LOSS: losses.mean(len(runner.train_dataloader))},
                                runner.epoch + 1)

    def after_train(self, runner) -> None:
        tensorboard = board_of(runner)
        if tensorboard is not None:
            tensorboard.add_summaries(self._end)
