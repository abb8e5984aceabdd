"""SIGTERM and Ctrl-C save the run before it ends."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmfinetune.engine.hooks.checkpoint import SafeCheckpointHook, checkpoint_hook
from mmfinetune.engine.state import run_state
from mmfinetune.utils.errors import Stopped


@contextlib.contextmanager
def stoppable(runner: Runner) -> Iterator[None]:
    """Let SIGTERM and SIGINT (Slurm's preemption, Ctrl-C) save the runner's training, then end it by `Stopped`."""
    hook = _Stop()
    runner.register_hook(hook, priority='LOWEST')
    try:
        yield
    finally:
        hook.release()


class _Stop(Hook):
    """Notes a signal; the end of the step, or of the validation's batch, ends the run on all processes.

    A second Ctrl-C ends it at once. Not in configs, as it has to come after all other hooks.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._since = math.inf
        self._before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loop.dataloader.worker_init_fn = partial(_ignore_signals_in_worker, then=loop.dataloader.worker_init_fn)

    def release(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def after_train(self, runner: Runner) -> None:
        self.release()

    def _note(self, number: int, frame: object) -> None:
        # Ctrl-C comes twice at once where a launcher passes it on.
        if self._signal and number == signal.SIGINT and time.monotonic() - self._since > 1:
            self.release()
            raise KeyboardInterrupt
        if not self._signal:
            # In this order, as another signal may come in between.
            self._since = time.monotonic()
            self._signal = number
        os.write(2, b'\nStopping: the run is saved after this step (Ctrl-C again: at once)\n')

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        # After the last step of an epoch its checkpoint is about to be saved.
        if not self.end_of_epoch(runner.train_dataloader, batch_idx):
            self._stop_if_asked(runner, lambda hook: hook.save_step(runner))

    def after_train_epoch(self, runner: Runner) -> None:
        self._stop_if_asked(runner, lambda hook: hook.save_epoch(runner, runner.epoch + 1))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._stop_if_asked(runner, lambda hook: hook.save_epoch(runner, runner.epoch))

    def after_val(self, runner: Runner) -> None:
        self._stop_if_asked(runner, lambda hook: hook.save_epoch(runner, runner.epoch))

    def _stop_if_asked(self, runner: Runner, save: Callable[[SafeCheckpointHook], None]) -> None:
        if not self._before:  # outside of training
            return
        number = torch.tensor(self._signal)
        all_reduce(number, 'max')  # that of any process; does nothing in a single one
        if not number:
            return
        hook = checkpoint_hook(runner)
        if hook is not None:
            save(hook)
        # The launcher kills all as soon as one has left.
        barrier()
        last = run_state(runner).last
        raise Stopped(int(number), hook.files.folder / last if hook is not None and last else None)


def _ignore_signals_in_worker(worker: int, then: Callable[[int], None] | None) -> None:
    """Begin a worker that loads data: it leaves at no signal but that of the main process.

    Ctrl-C, Slurm and torchrun signal all processes of a run, and the step needs its batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        # A handler could not tell who sent it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()
    if then is not None:
        then(worker)


def _exit_on_parent_sigterm() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
