"""SIGTERM, SIGHUP and Ctrl-C save the run before it ends."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmfinetune.engine.hooks.checkpoint import SafeCheckpointHook, checkpoint_hook
from mmfinetune.engine.launch import STOP_TIMEOUT_S
from mmfinetune.engine.loader import WatchedLoader
from mmfinetune.engine.state import run_state
from mmfinetune.utils.errors import Stopped
from mmfinetune.utils.processes import Wakeup

# A process that waits for another one that is gone does not come to the end of its step. Before the launcher kills it.
GRACE_S = STOP_TIMEOUT_S - 20


@contextlib.contextmanager
def stoppable(runner: Runner) -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGINT (Slurm, a closed terminal, Ctrl-C) save the training, then end it by `Stopped`."""
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
        self._wakeup = Wakeup(GRACE_S, 'the step did not end, so nothing was saved')

    def before_train(self, runner: Runner) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            numbers.remove(signal.SIGHUP)
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)
        self._wakeup.begin(numbers)
        for loop, save in ((runner.train_loop, self._save_between_steps), (runner.val_loop, self._save_epoch)):
            if loop is not None and isinstance(loop.dataloader, WatchedLoader):
                loop.dataloader.on_wait = partial(self._stop_in_wait, runner, save)

    def release(self) -> None:
        """Give the signals back to whoever handled them before."""
        self._wakeup.end()
        while self._before:  # a signal in between comes here too
            number, handler = self._before.popitem()
            signal.signal(number, handler)

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
        leave_closed_terminal()
        if get_rank():  # a terminal signals all processes, and one says so
            return
        with contextlib.suppress(OSError):
            os.write(2, b'\nStopping: the run is saved after this step (Ctrl-C again: at once)\n')

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        # After the last step of an epoch its checkpoint is about to be saved.
        if not self.end_of_epoch(runner.train_dataloader, batch_idx):
            self._stop_if_asked(runner, lambda hook: hook.save_step(runner))

    def after_train_epoch(self, runner: Runner) -> None:
        self._stop_if_asked(runner, lambda hook: hook.save_epoch(runner, runner.epoch + 1))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._stop_if_asked(runner, partial(self._save_epoch, runner))

    def after_val(self, runner: Runner) -> None:
        self._stop_if_asked(runner, partial(self._save_epoch, runner))

    def _save_epoch(self, runner: Runner, hook: SafeCheckpointHook) -> None:
        hook.save_epoch(runner, runner.epoch)

    def _save_between_steps(self, runner: Runner, hook: SafeCheckpointHook) -> None:
        hook.save_between_steps(runner)

    def _stop_in_wait(self, runner: Runner, save: Callable[[Runner, SafeCheckpointHook], None]) -> None:
        """While no batch comes, perhaps none ever."""
        if self._signal and get_world_size() == 1:
            self._stop_if_asked(runner, partial(save, runner))
        elif self._signal:  # the others are in their step, and cannot be asked to save
            raise self._stopped(runner, self._signal)

    def _stop_if_asked(self, runner: Runner, save: Callable[[SafeCheckpointHook], None]) -> None:
        if not self._before:  # outside of training
            return
        number = torch.tensor(self._signal)
        all_reduce(number, 'max')  # that of any process; does nothing in a single one
        if not number:
            return
        self._wakeup.end()
        leave_closed_terminal()
        hook = checkpoint_hook(runner)
        if hook is not None:
            save(hook)
        # The launcher kills all as soon as one has left.
        barrier()
        raise self._stopped(runner, int(number))

    def _stopped(self, runner: Runner, number: int) -> Stopped:
        hook, last = checkpoint_hook(runner), run_state(runner).last
        return Stopped(number, hook.files.folder / last if hook is not None and last else None)


def leave_closed_terminal() -> None:
    """Write to nowhere what went to a terminal, or a pipe, that is closed: an error there would end the run unsaved."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, select.POLLOUT)
    for descriptor, events in outputs.poll(0):
        if events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
