"""Where a finished or running training keeps its config and its checkpoints."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.extras import warn
from mmfinetune.utils.files import read_text


def last_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that a run wrote last; None if there is none, or nothing says which."""
    pointer = work_dir / 'last_checkpoint'
    if not os.path.lexists(pointer):
        return None
    try:
        # The path in it is that of the machine that wrote it; the name is enough.
        file = work_dir / Path(read_text(pointer).strip()).name
        return file if file.is_file() else None
    except (OSError, Problem) as error:
        warn(Message('last-checkpoint-unreadable', path=pointer, why=str(error)))
        return None


def candidates(work_dir: Path) -> list[Path]:
    """Checkpoints that a run could be resumed from, the last written first."""
    found = [*work_dir.glob('epoch_*.pth'), *work_dir.glob('iter_*.pth')]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    last = last_checkpoint(work_dir)
    return [last, *(p for p in found if p != last)] if last else found


def best_checkpoint(work_dir: Path) -> Path:
    """The best checkpoint of a run, else its last.

    Raises:
        UserError: The folder holds none.
    """
    best = max(work_dir.glob('best_*.pth'), key=lambda p: p.stat().st_mtime, default=None)
    checkpoint = best or last_checkpoint(work_dir)
    if checkpoint is None:
        raise UserError('checkpoint-none', work_dir=work_dir)
    return checkpoint


@dataclass(frozen=True)
class RunFiles:
    """What is needed to use the model of a run.

    Attributes:
        work_dir: The run's folder.
        config: Its resolved config.
        checkpoint: The weights to take.
    """

    work_dir: Path
    config: Path
    checkpoint: Path


def find_run(work_dir: Path, config: Path | None = None, checkpoint: Path | None = None) -> RunFiles:
    """The config and the best checkpoint of a run.

    Args:
        work_dir: The run's folder.
        config: Instead of the config that MMEngine dumped at the top of the folder; of several
            the newest is taken.
        checkpoint: Instead of the best checkpoint, or the last where none is marked best.

    Raises:
        UserError: No such folder, no run in it, or no such file; runs near by are named.
    """
    if work_dir.is_file():
        raise UserError('run-file', path=work_dir, folder=work_dir.parent)
    config = config or _dumped_config(work_dir)
    if not work_dir.is_dir() or config is None:
        near = ' or '.join(map(str, _runs_near(work_dir)))
        reason = 'there is no config (*.py) in it' if work_dir.is_dir() else 'there is no such folder'
        raise UserError('run-missing', path=work_dir, reason=reason, near=f'; did you mean {near}?' if near else '')
    if not config.is_file():
        raise UserError('run-config', path=config)
    if checkpoint is None:
        checkpoint = best_checkpoint(work_dir)
    elif not checkpoint.is_file():
        found = ', '.join(sorted(p.name for p in work_dir.glob('*.pth'))) or 'no checkpoint'
        raise UserError('run-checkpoint', path=checkpoint, work_dir=work_dir, found=found)
    return RunFiles(work_dir, config, checkpoint)


def _dumped_config(folder: Path) -> Path | None:
    return max(folder.glob('*.py'), key=lambda p: (p.stat().st_mtime, p.name), default=None)


def _runs_near(folder: Path) -> list[Path]:
    """Runs that were perhaps meant: around the folder, best first."""

    def is_run(path: Path) -> bool:
        return _dumped_config(path) is not None and any(path.glob('*.pth'))

    # A folder of a run's logs is below it; one that holds several runs is above them.
    near = [p for p in (folder.parent, *folder.glob('*/'), *folder.glob('*/*/')) if is_run(p)]
    siblings = {p.name: p for p in folder.parent.glob('*/') if is_run(p) and p != folder}
    alike = difflib.get_close_matches(folder.name, siblings, len(siblings) or 1, 0)
    return [*near, *(siblings[name] for name in alike if siblings[name] not in near)][:4]
