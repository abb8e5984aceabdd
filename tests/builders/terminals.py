"""A terminal for a process, and what is seen on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Shown:
    """What a process wrote to its terminal."""

    code: int
    raw: str

    @property
    def lines(self) -> list[str]:
        """What is left on the screen, without colours."""
        lines, column = [''], 0
        for text in re.findall(r'\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+', self.raw):
            if text == '\n':
                lines.append('')
                column = 0
            elif text == '\r':
                column = 0
            elif text == '\x1b[2K':
                lines[-1] = ''
            elif text[0] != '\x1b':
                lines[-1] = f'{lines[-1][:column]:{column}}{text}{lines[-1][column + len(text) :]}'
                column += len(text)
        return [line.rstrip() for line in lines]

    @property
    def states(self) -> list[str]:
        """Each text that the status line had."""
        return re.findall(r'\r\x1b\[2K([^\x1b\r\n]+)(?=[\x1b\r]|\Z)', self.raw)


def in_terminal(
    *args: str | Path,
    columns: int = 120,
    env: dict[str, str] | None = None,
    seen: Callable[[str, subprocess.Popen], object] = lambda *_: None,
) -> Shown:
    """Run ``python …`` in a terminal.

    Args:
        *args: After ``python``.
        columns: Its width.
        env: Changes of the environment.
        seen: Called with all that was written so far and the process, each time there is more.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'COLUMNS')}
    process = subprocess.Popen(
        [sys.executable, *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**plain, 'TERM': 'xterm-256color', 'OMP_NUM_THREADS': '1', **(env or {})},
    )
    os.close(theirs)
    raw = b''
    with contextlib.suppress(OSError):  # of Linux, when the other side is closed
        while part := os.read(ours, 1 << 16):
            raw += part
            seen(raw.decode(errors='ignore'), process)
    os.close(ours)
    return Shown(process.wait(60), raw.decode().replace('\r\n', '\n'))
