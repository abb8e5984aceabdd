"""One run at a time in a work dir."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import writing

NAME = 'run.lock'
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunLock:
    """Held by the one process that writes into a work dir; a context, at whose end it is given up.

    The kernel locks the file `NAME` in the folder for as long as the process lives: whatever kills it, the next run may
    start, and no child of it keeps the lock. What stands in the file is for people, for file systems that have no locks,
    and for those where the locks of one machine say nothing to another.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._descriptor = -1

    def take(self, work_dir: Path) -> None:
        """Take the lock of a folder, which is made where it is missing; nothing if it is taken already.

        Raises:
            UserError: Another run has it, or may have it; or the folder cannot be written.
        """
        self._path = work_dir / NAME
        with writing(self._path):
            while self._descriptor < 0:
                work_dir.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    self._claim(descriptor)
                    # A run that ended in between has removed the file that was opened.
                    if self._is_in_place(descriptor):
                        self._descriptor = descriptor
                finally:
                    if self._descriptor < 0:
                        os.close(descriptor)

    def _claim(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._refusal('run-going-on', _wait_for_text(descriptor)) from None
            if error.errno not in _NO_LOCKS:
                raise
            free = False
        holder, own = _read(descriptor), _own()
        if holder and not _is_restart_of(holder):
            if holder['host'] != own['host']:
                raise self._refusal('run-elsewhere', holder)
            if not free and holder['pid'] != own['pid'] and _is_alive(holder['pid']):
                raise self._refusal('run-going-on', holder)
        text = json.dumps(own).encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
        os.fsync(descriptor)

    def _refusal(self, code: str, holder: dict[str, Any]) -> UserError:
        facts = {name: holder.get(name, '?') for name in ('pid', 'host', 'since', 'command')}
        return UserError(code, work_dir=self._path.parent, lock=self._path, here=socket.gethostname(), **facts)

    def _is_in_place(self, descriptor: int) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(descriptor), self._path.lstat())
        return False

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._is_in_place(self._descriptor):
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


def _own() -> dict[str, Any]:
    return {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'since': time.strftime('%Y-%m-%d %H:%M:%S'),
        'command': shlex.join(sys.argv),
        'job': os.environ.get('SLURM_JOB_ID'),
    }


def _is_restart_of(holder: dict[str, Any]) -> bool:
    """Whether Slurm has queued the holder's job again, which it does after that has ended: this is it."""
    return 'SLURM_RESTART_COUNT' in os.environ and holder.get('job') == os.environ.get('SLURM_JOB_ID')


def _read(descriptor: int) -> dict[str, Any] | None:
    """What the holder wrote; None for a file that is new or was not written by a run."""
    with contextlib.suppress(ValueError):
        found = json.loads(os.pread(descriptor, 2**16, 0))
        if isinstance(found, dict) and isinstance(found.get('host'), str) and isinstance(found.get('pid'), int):
            return found
    return None


def _wait_for_text(descriptor: int) -> dict[str, Any]:
    """The holder, which writes itself down just after it has the lock."""
    for _ in range(20):
        if found := _read(descriptor):
            return found
        time.sleep(0.05)
    return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return True
