"""Guards of a training run: NaN and infinity, divergence, early stopping."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch.nn.modules.batchnorm import _BatchNorm

from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_json

BAD_BATCH = 'bad_batch.json'
# A gradient scaler begins at 2^16: if 2^-4 overflows too, no scale will help.
_SCALER_SKIPS = 20
_CAUSES = (
    'a learning rate too high for this batch size (try --lr at a tenth)',
    'boxes or masks of no size, or labels beyond the classes (tools/check_dataset.py)',
    'fp16 overflow (try --amp bf16, or none)',
)


@HOOKS.register_module()
class BadNumbersHook(Hook):
    """Stops at, or skips, an update whose loss or gradient is NaN or infinite; warns of divergence.

    All processes of a run do so together: what is no number on one of them is in the gradient that
    all share. Loss terms, learning rates and images go to ``<work_dir>/bad_batch.json``. Under fp16
    an infinite gradient is the business of the gradient scaler, which lowers its scale and skips
    the update, unless a loss is no number or it happens 20 times in a row.

    Args:
        nan_policy: ``'stop'``, before the weights are touched; or ``'skip'``: weights, optimizer
            and BN statistics stay as they were before the update, the learning rate goes on.
        max_skips: So many skipped updates in a row stop the run.
        factor: Warn where the loss exceeds this times the median of the last ``window`` steps.
        window: In steps; no warning before half of it is there.
    """

    priority = 'HIGHEST'  # before the losses of a skipped step reach the log

    def __init__(self, nan_policy: str = 'stop', max_skips: int = 10, factor: float = 10.0, window: int = 100) -> None:
        if nan_policy not in ('stop', 'skip'):
            raise UserError(f'default_hooks.bad_numbers.nan_policy is {nan_policy!r}', cure="pass 'stop' or 'skip'")
        self.nan_policy = nan_policy
        self.max_skips = max_skips
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=window)
        self._warned = False
        self._skips = 0
        self._stepped = False
        self._images: list[dict] = []
        self._batch: list[dict] = []
        self._bad_losses: list[dict] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._handles: list[Any] = []

    def before_train(self, runner) -> None:
        model = bare_model(runner)
        self._runner = runner
        self._handles = [
            model.register_forward_hook(self._check_losses),
            # Before the update, when the gradients of all processes are averaged and unscaled.
            runner.optim_wrapper.optimizer.register_step_pre_hook(self._check_gradients),
        ]

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self._batch = [
            {'img_id': sample.metainfo.get('img_id'), 'img_path': sample.metainfo.get('img_path')}
            for sample in (data_batch or {}).get('data_samples', ())
        ]
        if runner.optim_wrapper.should_update():
            # The last update is done. All images until the next one are suspects.
            self._images.clear()
            self._bad_losses.clear()
            self._stepped = False
            if self.nan_policy == 'skip':
                self._keep_statistics(runner.model)
        self._images += self._batch

    def _keep_statistics(self, model: torch.nn.Module) -> None:
        # The forward pass of a bad batch changes them already.
        if not self._buffers:
            self._buffers = [
                (b, b.clone()) for m in model.modules() if isinstance(m, _BatchNorm) and m.training for b in m.buffers()
            ]
        for buffer, kept in self._buffers:
            kept.copy_(buffer)

    def _check_losses(self, model: torch.nn.Module, args: tuple, output: Any) -> dict | None:
        if not isinstance(output, dict) or not model.training:
            return None
        losses = {
            name: value if isinstance(value, Sequence) else [value] for name, value in output.items() if 'loss' in name
        }
        # One look for all terms: each is a wait for the GPU.
        if not losses or bool(
            torch.isfinite(torch.stack([v.detach().float().sum() for values in losses.values() for v in values]).sum())
        ):
            return None
        terms = {name: float(sum(v.detach().sum() for v in values)) for name, values in losses.items()}
        bad = [f'{name} = {value}' for name, value in terms.items() if not math.isfinite(value)]
        self._bad_losses.append(
            {
                'rank': get_rank(),
                'step': self._runner.iter + 1,
                'what': f'the loss is not a number: {", ".join(bad) or "the sum of all terms"}',
                'losses': {name: repr(value) for name, value in terms.items()},
                'images': self._batch,
            }
        )
        # Into the gradient, which all processes share, whatever the loss made of it.
        return {**output, **{name: [v * math.nan for v in values] for name, values in losses.items()}}

    def _check_gradients(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._stepped = True
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            self._skips = 0
            return
        bad = [
            group.get('name', f'group {i}')
            for i, group in enumerate(optimizer.param_groups)
            if any(not torch.isfinite(p.grad).all() for p in group['params'] if p.grad is not None)
        ]
        self._judge(f'the gradient is not a number, in {", ".join(bad) or "its norm alone"}')
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = None  # an optimizer leaves such parameters as they are

    def _judge(self, gradient: str) -> None:
        """Stop, or note the skip of an update; on all processes alike."""
        losses, images = zip(*all_gather_object((self._bad_losses, self._images)), strict=True)
        found = [loss for of_rank in losses for loss in of_rank]
        suspects = [i for loss in found for i in loss['images']] or [image for of_rank in images for image in of_rank]
        what = found[0]['what'] if found else gradient
        self._skips += 1
        runner = self._runner
        path = Path(runner.work_dir) / BAD_BATCH
        if is_main_process():
            atomic_write_json(
                path,
                {
                    'step': runner.iter + 1,
                    'epoch': runner.epoch + 1,
                    'what': what,
                    'bad_losses': found,
                    'lr': {
                        g.get('name', str(i)): g['lr']
                        for i, g in enumerate(runner.optim_wrapper.optimizer.param_groups)
                    },
                    'images': json.loads(json.dumps(suspects, default=str)),
                },
                indent=1,
            )
        where = f'Step {runner.iter + 1} (epoch {runner.epoch + 1})'
        if self.nan_policy == 'skip' and self._skips < self.max_skips:
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
            print_log(f'{where} is skipped: {what} (see {path})', logger='current', level=logging.WARNING)
            return
        row = f' ({self._skips} skipped in a row)' if self.nan_policy == 'skip' else ''
        cure = '' if row else '. To leave such steps out: --cfg-options default_hooks.bad_numbers.nan_policy=skip'
        raise UserError(
            f'{where}: {what}{row}. The weights are those before the step. Its images (also in {path}):',
            [str(i['img_path'] or i['img_id']) for i in suspects],
            f'likely causes: {"; ".join(_CAUSES)}{cure}',
        )

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if runner.optim_wrapper.should_update() and not self._stepped:
            self._after_scaler_skip()
        if not outputs or 'loss' not in outputs:
            return
        value = float(torch.as_tensor(outputs['loss']).detach())
        if not math.isfinite(value):
            # Left out, or one such step would make the mean of its epoch NaN.
            outputs.clear()
            return
        if not self._warned and len(self._recent) >= self._recent.maxlen // 2:
            median = statistics.median(self._recent)
            if value > self.factor * median > 0:
                self._warned = True
                rates = [g['lr'] for g in runner.optim_wrapper.optimizer.param_groups]
                print_log(
                    f'Step {runner.iter + 1}: the loss {value:.4g} is {value / median:.0f} times '
                    f'the median of the last {len(self._recent)} steps. The run may diverge (lr '
                    f'{max(rates):g}). Likely causes: {"; ".join(_CAUSES)}.',
                    logger='current',
                    level=logging.WARNING,
                )
        self._recent.append(value)

    def _after_scaler_skip(self) -> None:
        """Tell a loss that is no number from a scale that is too high for fp16."""
        self._skips += 1
        if any(all_gather_object(bool(self._bad_losses))):
            self._skips -= 1
            self._judge('')
        elif self._skips >= _SCALER_SKIPS:
            self.nan_policy = 'stop'
            self._judge(f'the gradient is not a number, {self._skips} times in a row and at any scale')
