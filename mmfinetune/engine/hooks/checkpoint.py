"""When a run is saved, and what its checkpoints hold in addition to MMEngine's state."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from mmfinetune.config.resume import VERSION, BatchSetup, check_version, settings_of
from mmfinetune.engine.checkpoints import BACKEND, WITHIN_EPOCH, Checkpoints
from mmfinetune.engine.hooks import PRIORITY
from mmfinetune.engine.state import KEY, run_state, update_run_state, upgrade
from mmfinetune.utils.dist import bare_model, rank0_first
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_bytes, require_folder
from mmfinetune.weights import read


@HOOKS.register_module()
class SafeCheckpointHook(Hook):
    """Saves a run so that it always has a complete checkpoint to continue from.

    Files are written atomically, and an old file is removed only after the new one is there. After its validation, and
    after all that other hooks write of it, an epoch is saved again: so a checkpoint knows whether its epoch was
    validated and which score is the best, and a run that is killed in between validates it when resumed. Gradients that
    wait in an unfinished accumulation are saved too.

    Args:
        interval, by_epoch, …, save_begin: As of MMEngine's ``CheckpointHook``.
        every_n_iters: Save within the epoch too, each so many steps: ``iter_<n>.pth``, of which
            only the newest is kept, until the epoch's own checkpoint. 0 does not.

    Raises:
        UserError: Before the first step and before each save, if the disk has too little room.
    """

    priority = PRIORITY['SafeCheckpointHook']
    files: Checkpoints  # from `before_train` on

    def __init__(
        self,
        interval: int = -1,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | None = None,
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        save_best: str | Sequence[str] | None = None,
        rule: str | Sequence[str] | None = None,
        greater_keys: Sequence[str] | None = None,
        less_keys: Sequence[str] | None = None,
        filename_tmpl: str | None = None,
        published_keys: str | Sequence[str] | None = None,
        save_begin: int = 0,
        every_n_iters: int = 0,
    ) -> None:
        if every_n_iters and not by_epoch:
            raise UserError('checkpoint-every-n-iters')
        self.interval, self.by_epoch, self.save_begin, self.save_last = interval, by_epoch, save_begin, save_last
        self.every_n_iters, self.max_keep_ckpts, self.out_dir = every_n_iters, max_keep_ckpts, out_dir
        self.pattern = filename_tmpl or ('epoch_{}.pth' if by_epoch else WITHIN_EPOCH)
        self._content = {'save_optimizer': save_optimizer, 'save_param_scheduler': save_param_scheduler}
        self.published_keys = [published_keys] if isinstance(published_keys, str) else published_keys
        self._rules = partial(_rules, rule=rule, greater_keys=greater_keys, less_keys=less_keys)
        # Metric -> 'greater' or 'less', or None for 'auto' before its first validation.
        self.best_rules = self._rules(save_best) if save_best else {}
        self._is_training = False
        self._saved_at = 0
        self._gradients: dict[str, torch.Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        work_dir = Path(runner.work_dir)
        folder = Path(self.out_dir, work_dir.name) if self.out_dir else work_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._work_dir = work_dir.stat()
        self.files = Checkpoints(folder, self.pattern, self.max_keep_ckpts, is_main_process())
        if self.files.writes:
            # Of writes that were killed; see `atomic_write_all`.
            for path in work_dir.rglob('.*.[0-9]*.tmp'):
                path.unlink(missing_ok=True)
        self.files.remove(run_state(runner).outdated)
        setup = vars(BatchSetup.of_config(runner.cfg, get_world_size()))
        changes = {'batch_setup': setup, 'settings': settings_of(runner.cfg)}
        update_run_state(runner, version=VERSION, outdated=[], best=self._best_there(runner), **changes)
        self._saved_at = runner.iter
        self._require_room(runner)
        self._is_training = True

    def _best_there(self, runner: Runner) -> dict[str, dict[str, Any]]:
        """The best scores whose files can be read; another would leave the run without a best checkpoint."""
        found = run_state(runner).best.copy()
        for metric, entry in run_state(runner).best.items():
            why = rank0_first(partial(_why_unreadable, self.files.folder / entry['file']))
            if why:
                runner.logger.warning(f'{why}: the next validation makes a new best checkpoint')
                del found[metric]
        return found

    def _require_room(self, runner: Runner) -> None:
        weights, full = checkpoint_bytes(runner)
        saves = math.ceil(runner.max_epochs / self.interval) if self.by_epoch and self.interval > 0 else 1
        self.files.require_room(saves, full, bool(self.every_n_iters) * full + bool(self.best_rules) * weights)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.every_n_train_iters(runner, 10):
            require_folder(runner.work_dir, self._work_dir)
        if self.by_epoch:
            due = self.every_n_iters and runner.iter + 1 - self._saved_at >= self.every_n_iters
            # The last step of an epoch is followed by the epoch's own checkpoint.
            due = due and not self.end_of_epoch(runner.train_dataloader, batch_idx)
        else:
            due = self.every_n_train_iters(runner, self.interval, self.save_begin)
            due = due or (self.save_last and self.is_last_train_iter(runner))
        if due:
            self.save_step(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        due = self.every_n_epochs(runner, self.interval, self.save_begin)
        if self.by_epoch and (due or (self.save_last and self.is_last_train_epoch(runner))):
            runner.logger.info(f'Saving checkpoint at {runner.epoch + 1} epochs')
            self._save(runner, runner.epoch + 1, runner.iter)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        if not self.best_rules or not self._is_training:
            return
        if not metrics:
            runner.logger.warning('The validation has no metrics: no best checkpoint is chosen')
            return
        if 'auto' in self.best_rules:
            self.best_rules = self._rules(next(iter(metrics)))
        best = run_state(runner).best
        if '' in best:  # the only metric of an old checkpoint
            update_run_state(runner, best={next(iter(self.best_rules)): best['']})
        for metric, rule in self.best_rules.items():
            if metric not in metrics:
                raise UserError('checkpoint-no-metric', problems=sorted(metrics), metric=metric)
            self._save_if_best(runner, metric, rule, metrics[metric])

    def _save_if_best(self, runner: Runner, metric: str, rule: str, score: float) -> None:
        best = run_state(runner).best
        old = best.get(metric, {})
        if not CheckpointHook.rule_map[rule](score, old.get('score', CheckpointHook.init_value_map[rule])):
            return
        require_folder(runner.work_dir, self._work_dir)
        number = runner.epoch if self.by_epoch else runner.iter
        name = f'best_{metric}_{self.pattern.format(number)}'.replace('/', '_')
        update_run_state(runner, best={**best, metric: {'score': float(score), 'file': name}})
        replaces = [old['file']] if old else []
        self._write(runner, name, runner.epoch, runner.iter, replaces, **dict.fromkeys(self._content, False))
        runner.logger.info(f'The best checkpoint so far, {metric} = {score:0.4f}, is {name}')

    def after_val(self, runner: Runner) -> None:
        # After all that other hooks wrote of the validation in their `after_val_epoch`.
        if self._is_training and self._saved_at == runner.iter and run_state(runner).last:
            update_run_state(runner, validated_epoch=runner.epoch)
            self._save(runner, runner.epoch, runner.iter)

    def after_train(self, runner: Runner) -> None:
        state = run_state(runner)
        self._is_training = False
        if self.published_keys and self.files.writes:
            for name in filter(None, (state.last, *(entry['file'] for entry in state.best.values()))):
                _publish(self.files.folder / name, self.published_keys)

    def save_step(self, runner: Runner) -> None:
        """Save after a step, with an epoch that may be unfinished."""
        self._save_steps(runner, runner.iter + 1)

    def save_between_steps(self, runner: Runner) -> None:
        """Save before a step, unless what was done is saved already."""
        if self._saved_at != runner.iter:
            self._save_steps(runner, runner.iter)

    def _save_steps(self, runner: Runner, done: int) -> None:
        runner.logger.info(f'Saving checkpoint at {done} iterations')
        if self.by_epoch:
            self._save_as(runner, WITHIN_EPOCH.format(done), runner.epoch, done, self.files.within_epoch())
        else:
            self._save(runner, runner.epoch, done)

    def save_epoch(self, runner: Runner, epochs: int) -> None:
        """Save an epoch that is trained, unless it is saved already."""
        if self._saved_at != runner.iter:
            self._save(runner, epochs, runner.iter)

    def _save(self, runner: Runner, epoch: int, iteration: int) -> None:
        """Save the checkpoint of an epoch, or of a step where epochs do not count."""
        number = epoch if self.by_epoch else iteration
        kept, outdated = self.files.prune(run_state(runner).kept, number)
        update_run_state(runner, kept=kept, outdated=outdated)
        within = self.files.within_epoch() if self.by_epoch else []
        self._save_as(runner, self.pattern.format(number), epoch, iteration, [*outdated, *within])
        update_run_state(runner, outdated=[])

    def _save_as(self, runner: Runner, name: str, epoch: int, iteration: int, replaces: Sequence[str]) -> None:
        require_folder(runner.work_dir, self._work_dir)
        self._gradients = _waiting_gradients(runner)
        update_run_state(runner, last=name)
        self.files.point_to(name, Path(runner.work_dir))
        self._write(runner, name, epoch, iteration, replaces, **self._content)
        self._saved_at = iteration

    def _write(self, runner: Runner, name: str, epoch: int, iteration: int, replaces: Sequence[str], **content) -> None:
        content |= {'meta': {'epoch': epoch, 'iter': iteration}, 'backend_args': {'backend': BACKEND}}
        self.files.save(name, partial(runner.save_checkpoint, str(self.files.folder), name, **content), replaces)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # The best one holds weights alone.
        if 'optimizer' in checkpoint and self._gradients:
            checkpoint[KEY] = {'gradients': self._gradients}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # A resumed run loads its best weights too, to test them.
        if not runner.cfg.get('resume') or 'optimizer' not in checkpoint:
            return
        upgrade(checkpoint)
        check_version(checkpoint['message_hub']['runtime_info'][KEY], runner.cfg.get('load_from'))
        parameters = dict(bare_model(runner).named_parameters())
        for name, gradient in checkpoint.get(KEY, {}).get('gradients', {}).items():
            parameters[name].grad = gradient.to(parameters[name])


def _why_unreadable(path: Path) -> str:
    if not path.is_file():
        return f'{path.name} is not there'
    try:
        read.read_checkpoint(path)
    except UserError as error:
        return str(error.message)
    return ''


def _rules(metrics: str | Sequence[str], **arguments: Any) -> dict[str, Any]:
    """Which of two scores is better, for each metric, as MMEngine's hook tells it."""
    try:
        hook = CheckpointHook(save_best=metrics if isinstance(metrics, str) else list(metrics), **arguments)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError('checkpoint-rule', reason=str(error.args[0])) from None
    return dict(zip(hook.key_indicators, hook.rules, strict=True))


def _publish(path: Path, keys: Sequence[str]) -> None:
    """Write a copy with some of the entries, its SHA-256 in its name."""
    buffer = io.BytesIO()
    torch.save({key: value for key, value in read.read_checkpoint(path).items() if key in keys}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    atomic_write_bytes(path.with_name(f'{path.stem}-{digest[:8]}.pth'), buffer.getvalue())


def checkpoint_bytes(runner: Runner) -> tuple[int, int]:
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


def _waiting_gradients(runner: Runner) -> dict[str, torch.Tensor]:
    """Gradients of an unfinished accumulation by parameter, the mean over all processes."""
    if runner.optim_wrapper.should_update():
        return {}
    found = {name: p.grad.detach().clone() for name, p in bare_model(runner).named_parameters() if p.grad is not None}
    for gradient in found.values():
        all_reduce(gradient, 'mean')  # does nothing in a single process
    return {name: gradient.cpu() for name, gradient in found.items()}


def checkpoint_hook(runner: Runner) -> SafeCheckpointHook | None:
    """The one of a run, if there is one."""
    return next((hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)), None)
