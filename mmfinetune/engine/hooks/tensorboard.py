"""Hooks: weight transfer, learning rates, gradient norm, and what else TensorBoard shows."""

from __future__ import annotations

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmfinetune.engine import board
from mmfinetune.engine.vis_backends import board_of, validation_step


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
            grads = [
                param.grad for group in optimizer.param_groups for param in group['params'] if param.grad is not None
            ]
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
        head, start, self._end = board.hparam_summaries(board.hparams_of(runner.cfg, runner.world_size, runner.seed))
        tensorboard.add_summaries(head, start)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if 'eta' in runner.message_hub.runtime_info:
            runner.message_hub.update_scalar('train/eta_hours', runner.message_hub.get_info('eta') / 3600)

    def after_train_epoch(self, runner) -> None:
        tensorboard = board_of(runner)
        if tensorboard is None or not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        # The history is saved in checkpoints, so that an epoch that was interrupted counts whole.
        losses = runner.message_hub.get_scalar('train/loss')
        tensorboard.add_scalars({board.EPOCH_LOSS: losses.mean(len(runner.train_dataloader))}, runner.epoch + 1)

    def after_train(self, runner) -> None:
        tensorboard = board_of(runner)
        if tensorboard is not None:
            tensorboard.add_summaries(self._end)
