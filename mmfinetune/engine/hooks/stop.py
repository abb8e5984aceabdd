"""SIGTERM and Ctrl-C save the run before it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_reduce, barrier, get_world_size
from mmengine.hooks import Hook

from mmfinetune.engine.hooks.checkpoint import SafeCheckpointHook, checkpoint_hook
from mmfinetune.utils.errors import Stopped


@HOOKS.register_module()
class StopHook(Hook):
    """On SIGTERM or SIGINT (Slurm's preemption, Ctrl-C): save, then stop the run.

    The signal is only noted; the end of the step, or of the validation's batch, ends the run on
    all processes with `Stopped`. A second Ctrl-C stops at once. It comes after `SaveValidatedHook`.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._signal = 0
        self._before: dict[int, object] = {}

    def before_train(self, runner) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loop.dataloader.worker_init_fn = partial(_shield_worker, then=loop.dataloader.worker_init_fn)

    def release(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def after_train(self, runner) -> None:
        self.release()

    def _note(self, number: int, frame) -> None:
        # Ctrl-C comes twice at once where a launcher passes it on.
        if self._signal and number == signal.SIGINT and time.monotonic() - self._since > 1:
            self.release()
            raise KeyboardInterrupt
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
        os.write(2, b'\nStopping: the run is saved after this step (Ctrl-C again: at once)\n')

    def _asked(self) -> int:
        """The signal that any of the processes got; 0 for none."""
        if get_world_size() == 1 or not self._before:
            return self._signal
        number = torch.tensor(self._signal)
        all_reduce(number, 'max')
        return int(number)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        # After the last step of an epoch its checkpoint is about to be saved.
        if self.end_of_epoch(runner.train_dataloader, batch_idx):
            return
        number = self._asked()
        if number:
            self._stop(runner, number, lambda hook: hook.save_step(runner))

    def after_train_epoch(self, runner) -> None:
        self._stop_after_epoch(runner, ahead=1)

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._stop_after_epoch(runner)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self._stop_after_epoch(runner)

    def _stop_after_epoch(self, runner, ahead: int = 0) -> None:
        # A validation outside of training has no state to save, and no epoch: asking the runner
        # for it would build the training loop.
        number = self._asked() if self._before else 0
        if number:
            self._stop(runner, number, lambda hook: hook.save_epoch(runner, runner.epoch + ahead))

    def _stop(self, runner, number: int, save: Callable[[SafeCheckpointHook], None]) -> None:
        hook = checkpoint_hook(runner)
        if hook is not None:
            save(hook)
        # The launcher kills all as soon as one has left.
        barrier()
        raise Stopped(number, Path(hook.last_ckpt) if hook and hook.last_ckpt else None)


def _shield_worker(worker: int, then: Callable[[int], None] | None) -> None:
    """Begin a worker that loads data: it leaves at no signal but that of the main process.

    Ctrl-C, Slurm and torchrun signal all processes of a run, and the step needs its batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        # As a handler it could not tell who sent it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_leave_when_told, daemon=True).start()
    if then is not None:
        then(worker)


def _leave_when_told() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
