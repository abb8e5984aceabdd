"""Child processes: they end with their parent, and it knows what they are reading."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from typing import ClassVar

# Seconds without any result: after the first the user is told, after the second the work ends.
TELL_S, PATIENCE_S = 30.0, 600.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Let this process get a signal as soon as its parent ends, however it does.

    Args:
        parent: Its process id, as the parent itself told it: it may have ended already.
        number: The signal.
    """
    on_linux = sys.platform.startswith('linux')
    if not on_linux or ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number):
        threading.Thread(target=_follow, args=(parent, number), daemon=True).start()
    elif os.getppid() != parent:
        os.kill(os.getpid(), number)


def _follow(parent: int, number: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), number)


class Readers:
    """What each of several child processes is reading: its last file, in memory that they share with this one.

    Args:
        count: Number of processes.

    Raises:
        OSError: There is no memory to share.
    """

    _SLOT = 1024  # bytes of one: the process id, then the path
    _all: ClassVar[list[Readers]] = []  # a few, and small

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory = RawArray('c', count * self._SLOT)
        self._all.append(self)

    def note(self, slot: int) -> Callable[[], None]:
        """Note, from now on, the files that this process opens; call what is returned where a piece of work is done."""
        memory, start = memoryview(self._memory).cast('B'), slot * self._SLOT

        def write(text: str) -> None:
            data = f'{os.getpid()} {text}'.encode(errors='replace')[: self._SLOT - 1] + b'\0'
            memory[start : start + len(data)] = data

        def on_event(event: str, facts: tuple) -> None:
            # Python tells of each file before it is opened, whoever opens it.
            if event == 'open' and isinstance(facts[0], str):
                write(facts[0])

        write('')
        sys.addaudithook(on_event)
        return lambda: write('')

    def _slots(self) -> list[tuple[str, str]]:
        starts = range(0, self._count * self._SLOT, self._SLOT)
        texts = (self._memory[k : k + self._SLOT].partition(b'\0')[0].decode(errors='replace') for k in starts)
        return [(pid, path) for pid, _, path in (text.partition(' ') for text in texts)]

    def files(self) -> list[str]:
        """The files that they are at; a process between two pieces of work is at none."""
        return sorted({path for _, path in self._slots() if path})

    def kill(self) -> None:
        """End them: one that hangs would be waited for at the end of this process."""
        pids = {pid for pid, _ in self._slots()}
        for child in multiprocessing.active_children():
            if str(child.pid) in pids:
                child.kill()

    @classmethod
    def kill_all(cls) -> None:
        """End all of them."""
        if cls._all and threading.current_thread() is threading.main_thread():
            # PyTorch raises an error for a loading process that is killed.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for readers in cls._all:
                readers.kill()
