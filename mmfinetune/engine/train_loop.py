"""The training loop: resumes at any step as if it had never stopped."""

from __future__ import annotations

import bisect
import contextlib
import errno
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop, Runner
from mmengine.runner.utils import calc_dynamic_intervals

from mmfinetune.engine import compat
from mmfinetune.engine.hooks import warn
from mmfinetune.engine.loader import WatchedLoader, watched
from mmfinetune.engine.state import begin_epoch, run_state
from mmfinetune.engine.training_dataset import TrainingDataset, read_faults, seed_step
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.extras import note
from mmfinetune.utils.files import require_folder

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


@contextlib.contextmanager
def translate_system_errors(work_dir: str = '.') -> Iterator[None]:
    """Raise what the machine did to a run as a UserError: a full disk, a killed worker, a work dir that is gone."""
    before = Path(work_dir).stat()
    try:
        yield
    except OSError as error:
        require_folder(work_dir, before)
        if error.errno not in _DISK:
            raise
        raise UserError('run-cannot-write', reason=str(error)) from error
    except RuntimeError as error:
        if compat.is_out_of_shared_memory(error):
            raise UserError('shared-memory', reason=str(error).strip().splitlines()[-1]) from error
        if not compat.is_worker_killed(error):
            raise
        # Or PyTorch raises it again, wherever the program is, as each of the others leaves.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise UserError('run-worker-killed', reason=str(error).strip()) from error


def interval_after(done: int, milestones: Sequence[int], intervals: Sequence[int]) -> int:
    """The ``val_interval`` after so many epochs; MMEngine looks one ahead."""
    return intervals[bisect.bisect(milestones, done + 1) - 1]


def is_validation_due(done: int, length: int, begin: int, interval: int) -> bool:
    """Whether so many epochs of a run of `length` are followed by a validation; its end always is."""
    return done >= begin and (done % interval == 0 or done == length)


@LOOPS.register_module()
class ExactTrainLoop(BaseLoop):
    """Trains by epochs; every step is determined by seed and step number.

    The random numbers of a step and those of a sample are seeded by their numbers. So a run that
    is resumed, also within an epoch, computes what it would have computed without the stop, and
    2 processes draw what 1 process with accumulation 2 draws. The validation of an epoch that was
    trained but not validated is made up for when a run is resumed.

    Args:
        val_begin: The first epoch to validate.
        val_interval: Epochs between validations; the last epoch is always validated.
        dynamic_intervals: Pairs of an epoch and the ``val_interval`` from it on.
        max_faulty_images: How many unreadable images each process may replace by others.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: dict,
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
        max_faulty_images: int = 10,
    ) -> None:
        dataset = DATASETS.build(dataloader['dataset'])
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        self.data = TrainingDataset(dataset, runner.seed, runner.work_dir, max_faulty_images)
        super().__init__(runner, dict(dataloader, dataset=self.data))
        self.dataloader: WatchedLoader = watched(self.dataloader)
        self.max_epochs = max_epochs
        self.val_begin, self.val_interval = val_begin, val_interval
        self._milestones, self._intervals = calc_dynamic_intervals(val_interval, dynamic_intervals)
        self.stop_training = False  # EarlyStopHook sets it
        self._epoch = self._iter = 0  # Runner.resume sets them by these names
        runner.visualizer.dataset_meta = getattr(dataset, 'metainfo', None)

    epoch = property(lambda self: self._epoch)
    iter = property(lambda self: self._iter)
    max_iters = property(lambda self: self.max_epochs * len(self.dataloader))

    def run(self) -> torch.nn.Module:
        """Train and validate."""
        with translate_system_errors(self.runner.work_dir):
            self.runner.call_hook('before_train')
            if self.missed_validation:
                self._catch_up_validation()
            while self._epoch < self.max_epochs and not self.stop_training:
                self._run_epoch()
                if self._is_validation_due():
                    self.runner.val_loop.run()
            self.runner.call_hook('after_train')
        return self.runner.model

    def _is_validation_due(self) -> bool:
        self.val_interval = interval_after(self._epoch, self._milestones, self._intervals)
        due = is_validation_due(self._epoch, self.max_epochs, self.val_begin, self.val_interval)
        return self.runner.val_loop is not None and due

    @property
    def missed_validation(self) -> bool:
        """Whether the run was stopped after an epoch that is still to be validated."""
        state = run_state(self.runner)
        ended = self._iter > 0 and state.epoch_start.get('epoch') != self._epoch
        return ended and state.validated_epoch != self._epoch and self._is_validation_due()

    def _catch_up_validation(self) -> None:
        note(f'Epoch {self._epoch} was trained but not validated: validating it now')
        # As RuntimeInfoHook leaves them after the epoch; metrics may look at them.
        self.runner.message_hub.update_info_dict({'epoch': self._epoch - 1, 'iter': self._iter - 1})
        self.runner.val_loop.run()

    def _run_epoch(self) -> None:
        """Train an epoch, or what is left of it."""
        done = self._iter - begin_epoch(self.runner)['iter']
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.data.set_epoch(self._epoch)
        for idx, batch in enumerate(self._batches(done), done):
            seed_step(self.runner.seed, self._iter * get_world_size() + get_rank())
            self.runner.call_hook('before_train_iter', batch_idx=idx, data_batch=batch)
            outputs = self.runner.model.train_step(batch, optim_wrapper=self.runner.optim_wrapper)
            self.runner.call_hook('after_train_iter', batch_idx=idx, data_batch=batch, outputs=outputs)
            self._iter += 1
        if faults := read_faults(self.data.faults):
            facts = {'count': len(faults), 'file': self.data.faults.name, 'first': faults[0]['problem']}
            warn(Message('train-images-replaced', **facts))
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _batches(self, skip: int) -> Iterator[Any]:
        """The batches of the epoch after the first ``skip``, which are not even read."""
        if not skip:
            return iter(self.dataloader)
        note(f'Continuing epoch {self._epoch + 1} after step {skip} of {len(self.dataloader)}')
        return iter(self.dataloader.after(skip))
