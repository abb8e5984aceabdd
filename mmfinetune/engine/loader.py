"""Data loaders whose processes end with the run, are not waited for without end, and need little shared memory."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmfinetune.engine import compat
from mmfinetune.engine.hooks import warn
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.processes import PATIENCE_S, TELL_S, Readers, end_with_parent

POLL_S = 5.0
_END = object()


class WatchedLoader(DataLoader):
    """A loader that says which file its processes hang at, and ends the run if they hang for too long.

    Attributes:
        patience: Seconds that a batch may take; the loader's ``timeout`` in a config.
        on_wait: Called every few seconds in which no batch comes.
    """

    patience = PATIENCE_S
    on_wait: Callable[[], object] | None = None
    readers: Readers | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers and self.readers is None:
            try:
                self.readers = Readers(self.num_workers)
                # As PyTorch's iterator will, which leaves a traceback where it cannot.
                _ = [multiprocessing.Lock() for _ in range(8 + 4 * self.num_workers)]
            except OSError as error:
                raise UserError('shared-memory', reason=str(error)) from error
            self.worker_init_fn = _Begin(self.readers, self.worker_init_fn)
            self.collate_fn = _Collate(self.collate_fn)
        return self._watched(super().__iter__())

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._alarm():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[None]:
        """Look every few seconds what the block is waiting for."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        start, told = time.monotonic(), False

        def look(*_: object) -> None:
            nonlocal told
            if self.on_wait:
                self.on_wait()
            waited = time.monotonic() - start
            facts: dict[str, Any] = {
                'seconds': waited,
                'files': ', '.join(self.readers.files() if self.readers else ()),
            }
            facts['files'] = facts['files'] or 'a place that is not known'
            if waited >= self.patience:
                raise UserError('loader-hangs', **facts)
            if waited >= min(TELL_S, self.patience / 2) and not told:
                told = True
                warn(Message('loader-waits', **facts, patience=self.patience))

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, POLL_S, POLL_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before or signal.SIG_DFL)

    def after(self, skip: int) -> WatchedLoader:
        """The same loader without its first batches, which are not even read."""
        names = ['num_workers', 'collate_fn', 'pin_memory', 'worker_init_fn', 'prefetch_factor']
        same = {name: getattr(self, name) for name in [*names, 'multiprocessing_context']}
        rest = WatchedLoader(self.dataset, batch_sampler=list(self.batch_sampler or ())[skip:], **same)
        rest.patience, rest.on_wait, rest.readers = self.patience, self.on_wait, self.readers
        return rest


def watched(loader: DataLoader) -> WatchedLoader:
    """The loader itself, watched from now on."""
    if not isinstance(loader, WatchedLoader):
        # MMEngine names the class that it builds. This one adds no state that would have to be set up.
        loader.__class__ = WatchedLoader
        loader.patience, loader.timeout = loader.timeout or PATIENCE_S, 0
    assert isinstance(loader, WatchedLoader)
    return loader


# In the processes that load data.


@dataclass
class _Begin:
    """Begins one: it ends with the main process, and leaves at no signal but that of it.

    Ctrl-C, Slurm and torchrun signal all processes of a run, and the step needs its batch.
    """

    readers: Readers
    then: Callable[[int], None] | None

    def __post_init__(self) -> None:
        # Those of a fork server are its children.
        self.parent = os.getpid() if multiprocessing.get_start_method() != 'forkserver' else 0

    def __call__(self, worker: int) -> None:
        end_with_parent(self.parent or os.getppid())
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, 'sigwaitinfo'):  # not on macOS
            # A handler could not tell who sent it.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()
        global _done
        _done = self.readers.note(worker)
        compat.when_not_sent(_send_by_pipe)
        if self.then is not None:
            self.then(worker)


@dataclass
class _Collate:
    """Puts a batch together; then its files are read."""

    then: Callable[[list], Any]

    def __call__(self, samples: list) -> Any:
        batch = self.then(samples)
        _done()
        return batch


def _done() -> None:
    """A batch is read; `_Begin` puts another function here."""


def _exit_on_parent_sigterm() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


_sends_by_pipe = False
_told: list[str] = []  # in the main process


def _send_by_pipe(queue: Any, error: Exception, batch: Any) -> None:
    """Send a batch, and all after it, without the shared memory for which there was no room."""
    global _sends_by_pipe
    if _sends_by_pipe:
        traceback.print_exception(error)
        os._exit(1)  # else the batch would be waited for
    _sends_by_pipe = True
    ForkingPickler.register(torch.Tensor, functools.partial(_as_array, str(error)))
    queue.put(batch)


def _as_array(why: str, tensor: torch.Tensor) -> tuple:
    return _from_array, (tensor.detach().numpy(), why)


def _from_array(array: np.ndarray, why: str) -> torch.Tensor:
    if not _told:
        _told.append(why)
        warn(Message('shared-memory-full', reason=why))
    return torch.from_numpy(array)
