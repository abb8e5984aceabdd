"""What a run does at a loss or gradient that is NaN or infinite."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmfinetune.engine.hooks import PRIORITY, loss_of, warn
from mmfinetune.engine.hooks.divergence import CAUSES
from mmfinetune.engine.optim import guarded
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import atomic_write_json

BAD_BATCH = 'bad_batch.json'
# A gradient scaler begins at 2^16: if 2^-4 overflows too, no scale will help.
_SCALER_SKIPS = 20


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops at, or skips, an update whose loss or gradient is NaN or infinite, on all processes alike.

    During training `GuardedUpdate` is mixed into the class of the run's optimizer wrapper, whatever its type in the
    config, and makes no such update; this hook decides what follows. Loss terms, learning rates and images go to
    ``<work_dir>/bad_batch.json``. Under fp16 an infinite gradient is left to the gradient scaler, unless a loss is not
    finite or it happens 20 times in a row.

    Args:
        nan_policy: ``'stop'``; or ``'skip'``: weights, optimizer and BN statistics stay as they were before the
            update, the learning rate schedule continues.
        max_skips: This many skipped updates in a row stop the run.
    """

    priority = PRIORITY['NonFiniteHook']

    def __init__(self, nan_policy: str = 'stop', max_skips: int = 10) -> None:
        if nan_policy not in ('stop', 'skip'):
            raise UserError('nonfinite-policy', policy=nan_policy)
        self.nan_policy = nan_policy
        self.max_skips = max_skips
        self._skips = 0  # updates in a row that were not made
        # Since the last update:
        self._images: list[dict] = []
        self._bad_losses: list[dict] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_train(self, runner) -> None:
        wrapper: OptimWrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict):
            raise UserError('nonfinite-many-optimizers')
        # MMEngine builds it before any hook is called, and schedulers know it by then.
        wrapper.__class__ = guarded(type(wrapper))

    def after_train(self, runner) -> None:
        runner.optim_wrapper.__class__ = type(runner.optim_wrapper).__bases__[-1]

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if runner.optim_wrapper.should_update():
            # The last update is done. All images until the next one are suspects.
            self._images.clear()
            self._bad_losses.clear()
            if self.nan_policy == 'skip' and not self._buffers:
                modules = [m for m in runner.model.modules() if m.training]
                norms = [m for m in modules if getattr(m, 'running_mean', None) is not None]
                self._buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
            # The forward pass of a bad batch changes them already.
            for buffer, kept in self._buffers:
                kept.copy_(buffer)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        samples = (data_batch or {}).get('data_samples', ())
        images = [{key: sample.metainfo.get(key) for key in ('img_id', 'img_path')} for sample in samples]
        self._images += images
        loss = loss_of(outputs)
        if loss is not None and not math.isfinite(loss):
            terms = {k: torch.as_tensor(v).item() for k, v in outputs.items() if 'loss' in k and k != 'loss'}
            bad = [f'{name} = {value}' for name, value in terms.items() if not math.isfinite(value)]
            losses = {name: repr(value) for name, value in terms.items()}
            note = {'rank': get_rank(), 'step': runner.iter + 1, 'bad': bad, 'losses': losses, 'images': images}
            self._bad_losses.append(note)
            for name in outputs:
                # For the step an entry that no mean counts: one such loss would make that of its epoch NaN.
                runner.message_hub.update_scalar(f'train/{name}', 0.0 if 'loss' in name else math.nan, count=0)
            outputs.clear()
        if runner.optim_wrapper.should_update():
            if runner.optim_wrapper.refused is None:
                self._skips = 0
            else:
                self._stop_or_skip(runner)

    def _stop_or_skip(self, runner) -> None:
        losses, images = zip(*all_gather_object((self._bad_losses, self._images)), strict=True)
        bad_losses, wrapper = list(itertools.chain(*losses)), runner.optim_wrapper
        self._skips += 1
        scale_alone = wrapper.scaled and not bad_losses
        if scale_alone and self._skips < _SCALER_SKIPS:
            return
        what = self._what(bad_losses, wrapper.refused, scale_alone)
        suspects = [image for loss in bad_losses for image in loss['images']] or list(itertools.chain(*images))
        path = Path(runner.work_dir) / BAD_BATCH
        facts: dict[str, Any] = {'step': runner.iter + 1, 'epoch': runner.epoch + 1, 'what': what}
        if is_main_process():
            rates = {group.get('name', str(i)): group['lr'] for i, group in enumerate(wrapper.optimizer.param_groups)}
            note = {**facts, 'bad_losses': bad_losses, 'lr': rates, 'images': suspects}
            atomic_write_json(path, json.loads(json.dumps(note, default=str)), indent=1)
        facts['path'] = path
        if self.nan_policy == 'skip' and not scale_alone and self._skips < self.max_skips:
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
            warn(Message('nonfinite-skipped', **facts))
            return
        problems = [str(image['img_path'] or image['img_id']) for image in suspects]
        facts['causes'] = CAUSES
        if self.nan_policy == 'skip':
            raise UserError('nonfinite-skips', problems=problems, skips=self._skips, **facts)
        raise UserError('nonfinite-step', problems=problems, **facts)

    def _what(self, bad_losses: list[dict], groups: list[str], scale_alone: bool) -> Message:
        if bad_losses:
            terms = ', '.join(bad_losses[0]['bad']) or 'the sum of all terms'
            return Message('nonfinite-loss', terms=terms)
        if scale_alone:
            return Message('nonfinite-at-any-scale', times=self._skips)
        return Message('nonfinite-gradient', groups=', '.join(groups) or 'its norm alone')
