"""Which checkpoint a run is resumed from, and whether it can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import flatten
from mmfinetune.utils.dist import rank0_first, say
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.weights import read
from mmfinetune.weights import work_dir as weights_work_dir

if TYPE_CHECKING:
    from mmengine.config import Config

AUTO = 'auto'
# Of what this toolkit keeps in a checkpoint: its key, there and in the message hub, and its layout.
KEY = 'mmfinetune'
VERSION = 2


# What the rates of the param groups follow from.
_OF_OPTIMIZER = ('optimizer', 'paramwise_cfg', 'constructor')


@dataclass(frozen=True)
class BatchSetup:
    """What the images of an update are made of; steps and learning rate follow from it."""

    processes: int
    batch_size: int
    accumulation: int

    @classmethod
    def of_config(cls, cfg: Config, world: int) -> BatchSetup:
        """The setup of a run in so many processes."""
        return cls(world, cfg.train_dataloader.batch_size, cfg.optim_wrapper.get('accumulative_counts', 1))

    @property
    def images(self) -> int:
        """Images of a step, of all processes."""
        return self.processes * self.batch_size

    def __str__(self) -> str:
        return f'{self.processes} processes x {self.batch_size} images x {self.accumulation} accumulation'


def set_resume(cfg: Config, resume: str | bool, world: int) -> _Run | None:
    """Let the run continue from a checkpoint.

    Args:
        cfg: Resolved config; changed in place.
        resume: A checkpoint; True for the newest of the work dir; ``'auto'`` for that, if there is one.
        world: Number of processes.

    Returns:
        The run that is continued; None where one begins.
    """
    if isinstance(resume, str) and resume != AUTO:
        if not Path(resume).is_file():
            raise UserError('resume-missing', path=resume)
        found = _read_run(Path(resume))
    else:
        # One choice for all, made before any process writes there again.
        found = rank0_first(lambda: _newest(Path(cfg.work_dir), resume == AUTO))
    if found is None:
        say(f'There is nothing to resume in {cfg.work_dir}: the run begins')
        cfg.resume = False
        return None
    cfg.resume = True
    cfg.load_from = str(found.path)
    _check_batch_setup(found, BatchSetup.of_config(cfg, world))
    if found.seed is not None:
        # What is drawn in each step follows from it.
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=found.seed)
    return found


def settings_of(cfg: Mapping) -> dict[str, Any]:
    """What steps and rates of a run follow from, as plain values: checkpoints hold it."""
    wrapper = {key: cfg['optim_wrapper'].get(key) for key in _OF_OPTIMIZER}
    found = {'optim_wrapper': wrapper, 'param_scheduler': cfg.get('param_scheduler'), 'train_cfg': cfg['train_cfg']}
    return json.loads(json.dumps(flatten.plain(found), default=str))


def set_schedule(cfg: Config, run: _Run, new: bool) -> list[str]:
    """Let optimizer and schedule be those of the run that is continued, unless those of the config are asked for.

    Args:
        cfg: Config with its final learning rate and schedule; changed in place.
        run: What is continued.
        new: Whether the run takes the config's from here on.

    Returns:
        What is used of the checkpoint and what of the config, one line each.

    Raises:
        UserError: The optimizer's state would not fit.
    """
    ours, theirs = settings_of(cfg), run.settings
    epochs = ours['train_cfg'].get('max_epochs')
    lines = [
        f'Resume: {run.path}, {run.epoch} epochs and {run.step:,} steps; of the checkpoint: weights, state of the '
        f'optimizer, seed, {"" if new else "learning rate and schedule, "}place in the epoch; all else of the config'
    ]
    if epochs and run.epoch >= epochs:
        lines.append(f'Resume: all {epochs} epochs are done: nothing is left to train (train_cfg.max_epochs)')
    if theirs is None:
        return lines
    old = theirs['train_cfg'].get('max_epochs')
    if old != epochs:
        lines.append(f'Resume: train_cfg.max_epochs = {epochs} of the config; it was {old}')
    fixed = {name: _shape(of) for name, of in (('ours', ours), ('theirs', theirs))}
    if wrong := flatten.differences(fixed['ours'], fixed['theirs'], 'optim_wrapper'):
        raise UserError('resume-other-optimizer', problems=wrong, path=run.path)
    names = ('optim_wrapper', 'param_scheduler')
    changes = [line for name in names for line in flatten.differences(ours[name], theirs[name], name)]
    if changes and new:
        lines += [f'Resume: {line}: the first, of the config, from here on (--new-schedule)' for line in changes]
    elif changes:
        lines += [f'warning: not used: {line}: the second, of the checkpoint, is' for line in changes]
        lines.append('         --new-schedule uses those of the config, as if they had held from the first step')
        cfg.optim_wrapper.update(theirs['optim_wrapper'])
        cfg.param_scheduler = theirs['param_scheduler']
    return lines


def _shape(settings: Mapping) -> dict[str, Any]:
    """What the state of an optimizer belongs to."""
    wrapper = settings['optim_wrapper']
    keys = (wrapper['paramwise_cfg'] or {}).get('custom_keys') or {}
    return {'type': wrapper['optimizer']['type'], 'constructor': wrapper['constructor'], 'custom_keys': list(keys)}


@dataclass(frozen=True)
class _Run:
    """What a checkpoint says of its run."""

    path: Path
    seed: int | None
    setup: BatchSetup | None
    settings: dict[str, Any] | None
    epoch: int
    step: int


def _newest(work_dir: Path, may_lack: bool) -> _Run | None:
    """The newest checkpoint that can be resumed; None where there is no checkpoint and ``may_lack``."""
    damaged: list[UserError] = []
    for path in weights_work_dir.candidates(work_dir):
        try:
            found = _read_run(path)
        except UserError as error:
            damaged.append(error)
            continue
        if damaged:
            say('\n  - '.join(['Damaged, so an older checkpoint is used:', *(str(e.message) for e in damaged)]))
        say(f'Resuming {path}')
        return found
    if may_lack and not damaged:
        return None
    if len(damaged) == 1:
        raise damaged[0]
    raise UserError('resume-nothing', problems=[e.message for e in damaged], work_dir=work_dir)


def _read_run(path: Path) -> _Run:
    """What a checkpoint says; a UserError unless it holds a run that can be resumed."""
    # The safe way; MMEngine would unpickle anything if that fails.
    loaded = read.read_checkpoint(path)
    needed = ('state_dict', 'meta', 'optimizer', 'message_hub')
    missing = [Message('resume-missing-key', key=key) for key in needed if not isinstance(loaded.get(key), Mapping)]
    if missing:
        raise UserError('resume-no-run', problems=missing, path=path)
    meta = loaded['meta']
    if 'config' in meta:
        # Runner.resume would run this text as Python; MMEngine's own files do not have it.
        raise UserError('resume-holds-code', path=path)
    try:
        state = loaded['message_hub'].get('runtime_info', {}).get(KEY, {})
        check_version(state, path)
        # Before version 1 it stood in `meta`.
        setup = state.get('batch_setup') or meta.get('recipe')
        setup = BatchSetup(**setup) if setup else None
        place = meta.get('epoch', 0), meta.get('iter', 0)
        return _Run(path, meta.get('seed'), setup, state.get('settings') or None, *place)
    # A tensor, in place of a number, has no truth.
    except (TypeError, AttributeError, ValueError, RuntimeError):
        raise UserError('resume-no-run', problems=[Message('resume-missing-key', key=KEY)], path=path) from None


def check_version(state: Mapping[str, Any], path: str | Path) -> None:
    """Refuse the state of a run that a newer version of the toolkit wrote."""
    version = state.get('version', VERSION)
    if version > VERSION:
        raise UserError('resume-newer-version', path=path, version=version, known=VERSION)


def _check_batch_setup(found: _Run, now: BatchSetup) -> None:
    """Refuse another batch: optimizer, schedule and the place in the epoch come from the file."""
    before = found.setup
    if before is None or (before.images, before.accumulation) == (now.images, now.accumulation):
        return
    same = f'--gpus {before.processes} --batch-size {before.batch_size}'
    if before.images % now.processes == 0:
        same = f'--batch-size {before.images // now.processes}'
    raise UserError(
        'resume-other-batch',
        path=found.path,
        before=str(before),
        now=str(now),
        options=f'{same} --accumulate {before.accumulation}',
    )
