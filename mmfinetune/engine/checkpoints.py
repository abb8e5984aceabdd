"""The checkpoint files of a run: written atomically, the old ones removed after it, room checked before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_bytes, atomic_write_text

BACKEND = 'atomic'
WITHIN_EPOCH = 'iter_{}.pth'
POINTER = 'last_checkpoint'
_MIB = 2**20


class AtomicBackend(LocalBackend):
    """MMEngine's way to the local disk, but each file is complete or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write to a temporary file, sync, rename."""
        path = Path(filepath)
        free = shutil.disk_usage(path.parent).free
        if free < len(obj):
            raise UserError('checkpoint-no-room', path=path, size=len(obj) / _MIB, free=free / _MIB)
        atomic_write_bytes(path, obj)


register_backend(BACKEND, AtomicBackend, force=True)


class Checkpoints:
    """The files in a folder, of which at every moment at least one is complete.

    Args:
        pattern: File name by number, e.g. ``epoch_{}.pth``.
        keep: How many of that pattern are kept; all if not positive.
        writes: False on all processes but the first, which change nothing.
    """

    def __init__(self, folder: Path, pattern: str, keep: int, writes: bool = True) -> None:
        self.folder, self.pattern, self.keep, self.writes = folder, pattern, keep, writes

    def prune(self, kept: Sequence[int], number: int) -> tuple[list[int], list[str]]:
        """Choose what a new checkpoint replaces: the numbers kept with it, and the files to remove."""
        if self.keep <= 0:
            return [], []
        numbers = [*(n for n in kept if n != number), number]
        return numbers[-self.keep :], [self.pattern.format(n) for n in numbers[: -self.keep]]

    def save(self, name: str, write: Callable[[], None], replaces: Iterable[str] = ()) -> None:
        """Write a checkpoint, then remove the files that it replaces.

        Raises:
            UserError: The disk is full or fails; the old files are still there.
        """
        try:
            write()
        except OSError as error:
            raise UserError('checkpoint-not-saved', path=self.folder / name, reason=str(error)) from error
        self.remove(old for old in replaces if old != name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; some may be gone already."""
        if self.writes:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def within_epoch(self) -> list[str]:
        """Checkpoints from within an epoch, which a newer one replaces."""
        return [path.name for path in self.folder.glob(WITHIN_EPOCH.format('*'))]

    def point_to(self, name: str, work_dir: Path) -> None:
        """Name the newest checkpoint in the file ``last_checkpoint``.

        Before the checkpoint is written: when killed in between, no pointer leads to an older one.
        """
        if self.writes:
            atomic_write_text(work_dir / POINTER, str(self.folder / name))

    def most(self, saves: int) -> int:
        """Files at the same time, where so many are saved in all."""
        # One more than is kept, as each is written before another goes.
        return 1 + (min(self.keep, saves) if self.keep > 0 else saves)

    def require_room(self, saves: int, full: int, extra: int = 0) -> None:
        """Check that all files of a run fit the disk.

        Args:
            saves: How many checkpoints it makes, not counting those within an epoch.
            full: Bytes of one.
            extra: Bytes of everything else: those within an epoch, the best weights.

        Raises:
            UserError: It does not, counting what lies there as room, since it will be replaced.
        """
        files = self.most(saves)
        need = files * full + extra
        room = shutil.disk_usage(self.folder).free + sum(path.stat().st_size for path in self.folder.glob('*.pth'))
        if self.writes and room < need:
            sizes: dict[str, Any] = {'size': full / _MIB, 'need': need / _MIB, 'room': room / _MIB}
            raise UserError('checkpoint-no-room-for-run', folder=self.folder, files=files, **sizes)
