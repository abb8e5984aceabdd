"""Where a finished or running training keeps its config and its checkpoints."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.utils.errors import UserError
from mmfinetune.weights import work_dir as weights_work_dir


def last_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that a run wrote last; None if there is none."""
    pointer = work_dir / 'last_checkpoint'
    # The path in it is that of the machine that wrote it; the name is enough.
    file = work_dir / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    return file if file is not None and file.is_file() else None


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
    best = sorted(work_dir.glob('best_*.pth'), key=lambda p: p.stat().st_mtime)
    if best:
        return best[-1]
    last = last_checkpoint(work_dir)
    if last is not None:
        return last
    raise UserError(f'There is no checkpoint in {work_dir}', cure='train first, or pass a checkpoint with --weights')


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
        raise UserError(f'{work_dir} is a file, not the work dir of a run', cure=f'pass its folder, {work_dir.parent}')
    if not work_dir.is_dir():
        raise UserError(f'There is no folder {work_dir}', cure=_cure(work_dir))
    if config is None:
        config = _dumped_config(work_dir)
        if config is None:
            raise UserError(
                f'{work_dir} is no work dir of a run: there is no config (*.py) in it', cure=_cure(work_dir)
            )
    elif not config.is_file():
        raise UserError(f'There is no config {config}', cure='correct the path of the config')
    if checkpoint is None:
        try:
            checkpoint = weights_work_dir.best_checkpoint(work_dir)
        except UserError as error:
            raise UserError(
                f'{error.message}, only the config {config.name}',
                cure='wait for the end of the first epoch, or name a checkpoint elsewhere',
            ) from None
    elif not checkpoint.is_file():
        found = sorted(p.name for p in work_dir.glob('*.pth'))
        raise UserError(
            f'There is no checkpoint {checkpoint}',
            cure=f'{work_dir} holds {", ".join(found)}' if found else 'correct the path of the checkpoint',
        )
    return RunFiles(work_dir, config, checkpoint)


def _dumped_config(folder: Path) -> Path | None:
    dumped = sorted(folder.glob('*.py'), key=lambda p: (p.stat().st_mtime, p.name))
    return dumped[-1] if dumped else None


def _is_run(folder: Path) -> bool:
    return _dumped_config(folder) is not None and any(folder.glob('*.pth'))


def _cure(folder: Path) -> str:
    """Runs that were perhaps meant: around the folder, best first."""
    # A folder of a run's logs lies below it; one that holds several runs lies above them.
    near = [p for p in (folder.parent, *folder.glob('*/'), *folder.glob('*/*/')) if _is_run(p)]
    beside = {p.name: p for p in folder.parent.glob('*/') if _is_run(p) and p != folder}
    alike = difflib.get_close_matches(folder.name, beside, len(beside) or 1, 0)
    near += [beside[name] for name in alike if beside[name] not in near]
    if near:
        return f'did you mean {" or ".join(str(p) for p in near[:4])}?'
    return 'pass the work dir of a training, e.g. work_dirs/mask_rcnn_pretrained'
