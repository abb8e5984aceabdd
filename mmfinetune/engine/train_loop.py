"""The training loop: resumes at any step as if it had never stopped."""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from mmfinetune.engine.state import EPOCH_START, VALIDATED
from mmfinetune.engine.training_dataset import TrainingDataset, read_faults, seed_step
from mmfinetune.utils.errors import UserError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def machine_trouble() -> Iterator[None]:
    """Tell what the machine did to a run as a UserError: a full disk, a killed worker."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f'The run cannot write its files: {error}. Its checkpoints are whole.',
            cure='mend that, e.g. make room, then go on with --resume',
        ) from error
    except RuntimeError as error:
        # PyTorch has no type of its own for it.
        if 'DataLoader worker' not in str(error):
            raise
        # Or PyTorch raises it again, wherever the program is, as each of the others leaves.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise UserError(
            f'{str(error).strip()} The checkpoints of the run are whole.',
            cure='go on with --resume. If the kernel killed it as memory ran out '
            '(dmesg tells), take fewer: --cfg-options train_dataloader.num_workers=1 '
            'val_dataloader.num_workers=1',
        ) from error


@LOOPS.register_module()
class ExactTrainLoop(EpochBasedTrainLoop):
    """``EpochBasedTrainLoop`` whose every step is determined by seed and step number.

    The random numbers of a step and those of a sample are seeded by their numbers. So a run that
    is resumed, also within an epoch, computes what it would have computed without the stop, and
    2 processes draw what 1 process with accumulation 2 draws. The validation of an epoch that was
    trained but not validated is made up for when a run is resumed.

    Args:
        runner: The runner.
        dataloader: Config of the training data.
        max_faulty_images: How many unreadable images each process may replace by others.
        **kwargs: See mmengine's ``EpochBasedTrainLoop``.
    """

    def __init__(self, runner, dataloader: dict, *args, max_faulty_images: int = 10, **kwargs) -> None:
        dataset = DATASETS.build(dataloader['dataset'])
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        self.data = TrainingDataset(dataset, runner.seed, runner.work_dir, max_faulty_images)
        dataloader = dict(copy.deepcopy(dataloader), dataset=self.data)
        super().__init__(runner, dataloader, *args, **kwargs)

    def run(self) -> torch.nn.Module:
        """Train and validate.

        Raises:
            UserError: The disk is full or fails, or a process that loads data was killed.
        """
        with machine_trouble():
            self.runner.call_hook('before_train')
            if self._iter and not self._is_within_epoch():
                self._validate(resumed=True)
            while self._epoch < self._max_epochs and not self.stop_training:
                self.run_epoch()
                self._validate()
            self.runner.call_hook('after_train')
        return self.runner.model

    def _is_within_epoch(self) -> bool:
        return self._start_of_epoch().get('epoch') == self._epoch

    def _start_of_epoch(self) -> dict[str, int]:
        """Epoch and step at which the last epoch began; kept in checkpoints."""
        # Not by the length of the data loader, which mmdet's AspectRatioBatchSampler with
        # drop_last gets wrong by one in some epochs.
        return self.runner.message_hub.runtime_info.get(EPOCH_START) or {}

    def _validate(self, resumed: bool = False) -> None:
        self._decide_current_val_interval()
        due = (
            self.runner.val_loop is not None
            and self._epoch >= self.val_begin
            and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)
        )
        known = self.runner.message_hub.runtime_info.get(VALIDATED)
        if not due or (resumed and known == self._epoch):
            return
        if resumed:
            print_log(f'Epoch {self._epoch} was trained but not validated: validating it now', logger='current')
            # As RuntimeInfoHook leaves them after the epoch; metrics may look at them.
            self.runner.message_hub.update_info_dict({'epoch': self._epoch - 1, 'iter': self._iter - 1})
        self.runner.val_loop.run()

    def run_epoch(self) -> None:
        """Train an epoch, or what is left of it."""
        if not self._is_within_epoch():
            self.runner.message_hub.update_info(EPOCH_START, {'epoch': self._epoch, 'iter': self._iter})
        done = self._iter - self._start_of_epoch()['iter']
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.data.set_epoch(self._epoch)
        for idx, data_batch in enumerate(self._batches(done), done):
            self.run_iter(idx, data_batch)
        self._tell_faults()
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _batches(self, skip: int) -> Iterator[Any]:
        """The batches of the epoch after the first ``skip``, which are not even read."""
        if not skip:
            return iter(self.dataloader)
        loader = self.dataloader
        print_log(f'Going on within epoch {self._epoch + 1}, after step {skip} of {len(loader)}', logger='current')
        return iter(
            DataLoader(
                loader.dataset,
                batch_sampler=list(loader.batch_sampler)[skip:],
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                worker_init_fn=loader.worker_init_fn,
                timeout=loader.timeout,
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
            )
        )

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """Train one step, on its own random numbers."""
        seed_step(self.runner.seed, self._iter * get_world_size() + get_rank())
        super().run_iter(idx, data_batch)

    def _tell_faults(self) -> None:
        faults = read_faults(self.data.faults)
        if faults:
            print_log(
                f'{len(faults)} training images cannot be read and are replaced by others '
                f'({self.data.faults.name}): {faults[0]["problem"]}',
                logger='current',
                level=logging.WARNING,
            )
