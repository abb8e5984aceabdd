"""The data set that training reads: random numbers of each sample's own, faulty images replaced."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from mmdet.datasets import OpenImagesChallengeDataset
from mmdet.registry import DATASETS
from mmengine.dist import get_rank
from torch.utils.data import Dataset, get_worker_info

from mmfinetune.utils.errors import UserError

FAULTS = 'faulty_images_rank{rank}.jsonl'
_SAMPLE, _STEP = 1, 2


@DATASETS.register_module(name='OpenImagesChallengeDataset', force=True)
class DataOnlyOpenImages(OpenImagesChallengeDataset):
    """MMDetection's, but for its relations of classes, a pickled array; see `mmfinetune.weights.data_only`."""

    def _get_relation_matrix(self, hierarchy_file: str) -> NoReturn:
        raise UserError('pickle-refused')


def seed_everything(*key: int) -> None:
    """Seed ``random``, NumPy and PyTorch (GPUs too) from several numbers."""
    # Not a sum, or sample 1 of epoch 2 would get the numbers of sample 2 of epoch 1.
    state = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.manual_seed(int(state[1]))


def seed_step(seed: int, step: int) -> None:
    """Seed what a training step draws, e.g. RoI samplers; needs no state in the checkpoint."""
    seed_everything(_STEP, seed, step)


@contextlib.contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put the random state of this process, and of a GPU, back afterwards."""
    state, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device is not None and device.type == 'cuda' else []):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)


class TrainingDataset(Dataset):
    """Wraps the data set of a config.

    What augmentation draws depends on the seed, the epoch and the sample alone: not on the number
    of workers or processes, nor on where a run was resumed.

    An image that cannot be read is noted in ``<work_dir>/faulty_images_rank<n>.jsonl`` and replaced
    by another one, drawn the same way.

    Args:
        dataset: A built data set. This object has its attributes too.
        max_faults: How many different images may be replaced in each process since the run was
            started or resumed; 0 stops at the first.

    Raises:
        UserError: From ``__getitem__``, at one image more than that; it lists all of them.
    """

    def __init__(self, dataset: Any, seed: int, work_dir: str, max_faults: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.max_faults = max_faults
        self.faults = Path(work_dir) / FAULTS.format(rank=get_rank())
        # Images may have been repaired since.
        self.faults.unlink(missing_ok=True)
        # Shared memory, since workers that live through all epochs have a copy of this object.
        try:
            self._epoch = multiprocessing.Value('q', 0, lock=False)
        except OSError:  # where /dev/shm cannot be written there are no workers either
            self._epoch = SimpleNamespace(value=0)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks before there is a `dataset`.
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # As mmdet's PipelineSwitchHook sets the `pipeline`.
        inner = self.__dict__.get('dataset')
        if name in self.__dict__ or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    def __deepcopy__(self, memo: dict) -> TrainingDataset:
        # The Runner copies the config of a data loader, and this object stands in it.
        return self

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the samples are for, before its first is read."""
        self._epoch.value = epoch

    def __getitem__(self, index: int) -> Any:
        with contextlib.nullcontext() if get_worker_info() else random_state_kept():
            seed_everything(_SAMPLE, self.seed, self._epoch.value, index)
            while True:
                try:
                    return self.dataset[index]
                except UserError as error:
                    self._note(index, error)
                index = int(np.random.randint(len(self)))

    def _note(self, index: int, error: UserError) -> None:
        """Write a fault down, once for each image; raise if it is one too many."""
        problem = str(error.message)
        # By the message, which names the file: a repeated data set has several indices for one.
        if problem not in self._problems():
            entry = {'index': index, 'epoch': self._epoch.value, 'problem': problem}
            # One short line in one write: workers append to the same file.
            with self.faults.open('a') as file:
                file.write(json.dumps(entry) + '\n')
        # Read again, with what other workers have written meanwhile.
        problems = self._problems()
        if len(problems) > min(self.max_faults, len(self) - 1):
            facts: dict[str, Any] = {'count': len(problems), 'allowed': self.max_faults}
            raise UserError('train-faulty-images', problems=sorted(problems), **facts)

    def _problems(self) -> set[str]:
        return {fault['problem'] for fault in read_faults(self.faults)}


def read_faults(path: Path) -> list[dict]:
    """The faults noted so far; a line cut short by a kill is left out."""
    faults = []
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                faults.append(json.loads(line))
    return faults
