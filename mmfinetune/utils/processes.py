"""Child processes: they end with their parent, and it knows what they are reading."""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import Any, ClassVar

from mmfinetune.utils.errors import Stopped, stopped_by

# Seconds without any result: after the first the user is told, after the second the work ends.
TELL_S, PATIENCE_S = 30.0, 600.0
# Seconds that a main thread may take to answer a signal; and within which a second one is the same again.
_ANSWER_S, _AGAIN_S = 20.0, 1.0
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


class Wakeup:
    """Ends the process some time after a signal if its main thread does not come to it.

    That may wait in PyTorch for another process of the run, where no handler of Python is called.

    Args:
        grace: Seconds that it has.
        why: What is said then.
    """

    def __init__(self, grace: float, why: str) -> None:
        self._grace, self._why = grace, why
        self._reader = self._writer = self._before = -1

    def begin(self, numbers: Sequence[int]) -> None:
        """Watch for these signals."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._reader, numbers), daemon=True).start()

    def end(self) -> None:
        """Do not end the process any more."""
        if self._writer >= 0:
            signal.set_wakeup_fd(self._before)
            writer, self._writer = self._writer, -1
            os.close(writer)  # the thread reads the end of the file, and leaves

    def _watch(self, reader: int, numbers: Sequence[int]) -> None:
        end, asked = math.inf, 0
        with open(reader, 'rb', buffering=0) as signals:
            while select.select([signals], [], [], None if math.isinf(end) else max(0.0, end - time.monotonic()))[0]:
                found = signals.read(1)
                if not found:
                    return
                if found[0] in numbers and not asked:
                    asked, end = found[0], time.monotonic() + self._grace
        with contextlib.suppress(OSError):
            os.write(2, f'{stopped_by(asked)}: {self._why}\n'.encode())
        os._exit(128 + asked)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, with the number of the signal.

    What is cleaned up after an error is cleaned up then too: locks, half-made folders, child processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    wakeup, last = Wakeup(_ANSWER_S, 'it did not end by itself'), -math.inf

    def interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
        nonlocal last
        wakeup.end()
        # It comes twice where a launcher passes it on, and must not interrupt the cleaning up, nor a run that has saved.
        again, last = time.monotonic() - last < _AGAIN_S, time.monotonic()
        if not again and not isinstance(sys.exc_info()[1], Stopped):
            raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    wakeup.begin(numbers)
    try:
        yield
    finally:
        wakeup.end()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables; afterwards all are as they were."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
