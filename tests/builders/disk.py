"""Disks that are nearly full, and files that are none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

Usage = namedtuple('Usage', 'total used free')


@contextlib.contextmanager
def nearly_full(free: int) -> Iterator[None]:
    """Let every disk have so many bytes left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda path: Usage(10 * free, 9 * free, free))
        yield


# What hangs, never ends or fills the memory where a file is expected.
STRANGE = ('fifo', 'device', 'folder', 'endless')


def strange(path: Path, kind: str) -> Path:
    """Put one of `STRANGE` where a file is expected."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    elif kind == 'folder':
        path.mkdir()
    else:
        with path.open('wb') as file:
            file.truncate(1 << 40)
    return path
