"""Disks that are nearly full."""

from __future__ import annotations

import contextlib
import shutil
from collections import namedtuple
from collections.abc import Iterator

import pytest

Usage = namedtuple('Usage', 'total used free')


@contextlib.contextmanager
def nearly_full(free: int) -> Iterator[None]:
    """Let every disk have so many bytes left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda path: Usage(10 * free, 9 * free, free))
        yield
