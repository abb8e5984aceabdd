"""Checkpoints that are whole or not there, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook

from mmfinetune.config.lr import recipe
from mmfinetune.engine.state import GRADIENTS, OUTDATED, VALIDATED, WITHIN_EPOCH
from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_bytes, atomic_write_text

BACKEND = 'atomic'
_MIB = 2**20


class AtomicBackend(LocalBackend):
    """Files of the local disk, written to a temporary file, synced and renamed."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        _require_room(Path(filepath), len(obj))
        atomic_write_bytes(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        self.put(obj.encode(encoding), filepath)


register_backend(BACKEND, AtomicBackend, force=True)


def _require_room(path: Path, size: int) -> None:
    """Raise a UserError where ``size`` bytes do not fit beside what is there."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UserError(
            f'{path} cannot be saved: it takes {size / _MIB:,.0f} MiB, and the disk has '
            f'{free / _MIB:,.0f} MiB left. The checkpoints before it are whole.',
            cure='make room (default_hooks.checkpoint.max_keep_ckpts=1 keeps fewer), then go on with --resume',
        )


class _LateRemoval(LocalBackend):
    """Notes what is to be removed, until what replaces it is there."""

    def __init__(self) -> None:
        self.noted: list[Path] = []

    def remove(self, filepath: str | Path) -> None:
        self.noted.append(Path(filepath))

    def remove_noted(self, *keep: str | Path | None) -> None:
        for path in self.noted:
            if path not in [Path(k) for k in keep if k]:
                path.unlink(missing_ok=True)
        self.noted.clear()


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """``CheckpointHook`` that never leaves the run without a whole checkpoint.

    Files are written atomically, and an old file goes only after the new one is there. Gradients
    that wait in an unfinished accumulation are saved too.

    Args:
        every_n_iters: Save within the epoch too, each so many steps: ``iter_<n>.pth``, of which
            only the newest is kept, until the epoch's own checkpoint. 0 does not.
        **kwargs: See mmengine's ``CheckpointHook``.

    Raises:
        UserError: Before the first step and before each save, if the disk has too little room.
    """

    def __init__(self, *args, every_n_iters: int = 0, **kwargs) -> None:
        super().__init__(*args, **{'backend_args': dict(backend=BACKEND), **kwargs})
        if every_n_iters and not self.by_epoch:
            raise ValueError('every_n_iters is for by_epoch=True; otherwise set interval')
        self.every_n_iters = every_n_iters
        self._saved_at = 0
        self._gradients: dict[str, torch.Tensor] = {}
        self._outdated: list[str] = []

    def before_train(self, runner) -> None:
        if is_main_process():
            _remove_leftovers(Path(runner.work_dir))
        if runner._resume and self.out_dir is None:
            _relocate(runner)
        super().before_train(runner)
        self.file_backend = _LateRemoval()
        self._saved_at = runner.iter
        self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')
        if is_main_process():
            for name in self._outdated:
                Path(self.out_dir, Path(name).name).unlink(missing_ok=True)
            self._require_room_for_run(runner)

    def _require_room_for_run(self, runner) -> None:
        weights, full = checkpoint_bytes(runner)
        saves = math.ceil(runner.max_epochs / self.interval) if self.by_epoch and self.interval > 0 else 1
        # One more than is kept, as each is written before another goes.
        files = 1 + bool(self.every_n_iters) + (min(self.max_keep_ckpts, saves) if self.max_keep_ckpts > 0 else saves)
        need = files * full + bool(self.save_best) * weights
        have = sum(path.stat().st_size for path in Path(self.out_dir).glob('*.pth'))
        free = shutil.disk_usage(self.out_dir).free
        if free + have < need:
            raise UserError(
                f'{self.out_dir} has too little room: up to {files} checkpoints of '
                f'{full / _MIB:,.0f} MiB and the best weights take {need / _MIB:,.0f} MiB at a '
                f'time, and {(free + have) / _MIB:,.0f} MiB can be had',
                cure='make room, pass another --work-dir, or keep fewer: --cfg-options '
                'default_hooks.checkpoint.max_keep_ckpts=1',
            )

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        # The last step of an epoch is followed by the epoch's own checkpoint.
        if (
            self.every_n_iters
            and runner.iter + 1 - self._saved_at >= self.every_n_iters
            and not self.end_of_epoch(runner.train_dataloader, batch_idx)
        ):
            self.save_step(runner)

    def save_step(self, runner) -> None:
        """Save after a step, with an epoch that may be unfinished."""
        if not self.by_epoch:
            self._save_checkpoint(runner)
            return
        done = runner.iter + 1
        path = Path(self.out_dir) / WITHIN_EPOCH.format(done)
        runner.logger.info(f'Saving checkpoint at {done} iterations')
        with self._saving(runner, path, done):
            runner.save_checkpoint(
                self.out_dir,
                path.name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                by_epoch=False,
                meta=dict(epoch=runner.epoch, iter=done, recipe=_recipe(runner)),
                backend_args=self.backend_args,
            )
        self._remove_within_epoch(keep=path)

    def save_epoch(self, runner, epochs: int) -> None:
        """Save an epoch that is trained, unless it is saved already."""
        if self._saved_at != runner.iter:
            self._save_checkpoint_with_step(
                runner, epochs if self.by_epoch else runner.iter, dict(epoch=epochs, iter=runner.iter)
            )

    def save_validated(self, runner) -> None:
        """Save the epoch again, if it was saved, now that it is validated and its score known."""
        if self._saved_at == runner.iter and self.last_ckpt is not None:
            runner.message_hub.update_info(VALIDATED, runner.epoch)
            self._saved_at = None
            self.save_epoch(runner, runner.epoch)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        path = Path(self.out_dir, self.filename_tmpl.format(step))
        with self._saving(runner, path, meta['iter']):
            super()._save_checkpoint_with_step(runner, step, {**meta, 'recipe': _recipe(runner)})
            self.file_backend.remove_noted(path)
        if self.by_epoch:
            self._remove_within_epoch()

    @contextlib.contextmanager
    def _saving(self, runner, path: Path, iteration: int) -> Iterator[None]:
        self._gradients = _waiting_gradients(runner)
        self.last_ckpt = str(path)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        try:
            if is_main_process():
                # Before the file: killed in between, no pointer leads to an older one.
                atomic_write_text(Path(runner.work_dir) / 'last_checkpoint', str(path))
            yield
        except OSError as error:
            raise UserError(
                f'{path} cannot be saved: {error}. The checkpoints before it are whole.',
                cure='make room, then go on with --resume',
            ) from error
        self._saved_at = iteration

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if 'optimizer' not in checkpoint:  # the best one: weights alone
            return
        if self._gradients:
            checkpoint[GRADIENTS] = self._gradients
        if self.file_backend.noted:
            # For a run that is killed before it comes to remove them.
            checkpoint[OUTDATED] = [path.name for path in self.file_backend.noted]

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        self._outdated = checkpoint.get(OUTDATED, [])
        parameters = dict(bare_model(runner).named_parameters())
        for name, gradient in checkpoint.get(GRADIENTS, {}).items():
            parameters[name].grad = gradient.to(parameters[name])

    def _remove_within_epoch(self, keep: Path | None = None) -> None:
        if is_main_process():
            for path in Path(self.out_dir).glob(WITHIN_EPOCH.format('*')):
                if path != keep:
                    path.unlink()

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        # The base class would save the epoch again; `SaveValidatedHook` does, when all is written.
        last, self.last_ckpt = self.last_ckpt, None
        super()._save_best_checkpoint(runner, metrics)
        self.last_ckpt = last
        if self.save_best:
            best = [self.best_ckpt_path] if len(self.key_indicators) == 1 else self.best_ckpt_path_dict.values()
            self.file_backend.remove_noted(*best)


def _recipe(runner) -> dict[str, int]:
    return recipe(runner.cfg, get_world_size())


def _remove_leftovers(work_dir: Path) -> None:
    """Remove the temporary files of writes that were killed; see `atomic_write_all`."""
    for path in work_dir.rglob('.*.[0-9]*.tmp'):
        path.unlink(missing_ok=True)


def _relocate(runner) -> None:
    """Take the files that a checkpoint names for those of this work dir.

    It may be a copy, and the best checkpoint of the original is not to be removed from here. A best
    score whose file is not there counts no more, or the run might end without a best checkpoint.
    """
    info = runner.message_hub.runtime_info
    for key in [k for k in info if k == 'last_ckpt' or k.startswith('best_ckpt')]:
        info[key] = str(Path(runner.work_dir, Path(info[key]).name))
        if key != 'last_ckpt' and not Path(info[key]).is_file():
            runner.logger.warning(f'{info.pop(key)} is not there: the next validation makes a new best checkpoint')
            info.pop(key.replace('best_ckpt', 'best_score'), None)


def checkpoint_bytes(runner) -> tuple[int, int]:
    """About what the weights take on the disk, and what a checkpoint to resume from takes."""

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    weights = size(bare_model(runner).state_dict().values())
    optimizer = runner.optim_wrapper.optimizer
    state = size(t for of in optimizer.state.values() for t in of.values() if isinstance(t, torch.Tensor))
    if not state:
        # There is none before the first step: momentum, and a second moment of all but SGD.
        trained = size(p for group in optimizer.param_groups for p in group['params'])
        state = trained * (1 if isinstance(optimizer, torch.optim.SGD) else 2)
    return weights, weights + state


def _waiting_gradients(runner) -> dict[str, torch.Tensor]:
    """Gradients of an unfinished accumulation by parameter, the mean over all processes."""
    if runner.optim_wrapper.should_update():
        return {}
    found = {name: p.grad.detach().clone() for name, p in bare_model(runner).named_parameters() if p.grad is not None}
    if get_world_size() > 1:
        for gradient in found.values():
            all_reduce(gradient, 'mean')
    return {name: gradient.cpu() for name, gradient in found.items()}


def checkpoint_hook(runner) -> SafeCheckpointHook | None:
    """The one of a run, if there is one."""
    return next((hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)), None)


@HOOKS.register_module()
class SaveValidatedHook(Hook):
    """Saves an epoch again after its validation, when all results are written.

    So a checkpoint knows whether its epoch was validated, and which score is the best; a run that
    is killed in between validates the epoch again when resumed.
    """

    priority = 'LOWEST'

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        hook = checkpoint_hook(runner)
        if hook is not None:
            hook.save_validated(runner)
