"""A run of MMEngine's Runner that takes half a second, with all that a resume must bring back.

Batch norm statistics, dropout, augmentation by three generators, momentum, warm-up, milestones.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import mmfinetune.engine.hooks.checkpoint
import mmfinetune.engine.hooks.early_stop
import mmfinetune.engine.train_loop  # noqa: F401
from mmfinetune.engine.hooks.stop import stoppable
from mmfinetune.utils.errors import Stopped, UserError
from mmfinetune.weights import read
from mmfinetune.weights import work_dir as weights_work_dir
from tests.builders.runs import forget_runs

IMAGES = 10
# Of epochs 1 to 6: the best is found, kept, and found again.
SCORES = (0.1, 0.3, 0.2, 0.4, 0.4, 0.1)


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.layers(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        # As RoI samplers do, which draw from NumPy or PyTorch.
        return {'loss': ((out - 1 - np.random.rand()) ** 2).mean()} if mode == 'loss' else [out]


@DATASETS.register_module(force=True)
class ToyDataset:
    def __init__(self, images: int = IMAGES, bad: tuple[int, ...] = (), pid_dir: str = '') -> None:
        self.images, self.bad, self.pid_dir = images, bad, pid_dir
        # A copy, since ConcatDataset adds to it.
        self.metainfo = {'classes': ('a',)}

    def full_init(self) -> None:
        pass

    def __len__(self) -> int:
        return self.images

    def get_data_info(self, index: int) -> dict:
        return {'width': 3 if index % 3 else 1, 'height': 2}

    def get_cat_ids(self, index: int) -> list[int]:
        return [0]

    def __getitem__(self, index: int) -> dict:
        if index in self.bad:
            raise UserError('toy-image', '{file} cannot be read', file=f'img{index}.jpg')
        if self.pid_dir:
            Path(self.pid_dir, str(os.getpid())).touch()
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return {'inputs': torch.full((4,), float(index)) + torch.rand(4) * noise, 'data_samples': index}


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    def __init__(self, names=('score',)) -> None:
        super().__init__()
        self.names = names

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results) -> dict[str, float]:
        done = MessageHub.get_current_instance().get_info('epoch')
        return dict.fromkeys(self.names, SCORES[min(done, len(SCORES) - 1)])


class DoAt(Hook):
    """Does something at a point of the run, such as sending a signal to the run itself.

    Args:
        action: A function of the runner, or the number of a signal.
        step: Steps done before; None for any.
        point: Name of a hook method.
    """

    priority = 'VERY_HIGH'

    def __init__(self, action, step: int | None = None, point: str = 'after_train_iter') -> None:
        def do(runner, *args, **kwargs):
            if self.pending and step in (None, runner.iter):
                self.pending = False
                if callable(action):
                    action(runner)
                else:
                    os.kill(os.getpid(), action)

        self.pending = True
        setattr(self, point, do)


def make_cfg(work_dir: Path, **changes) -> Config:
    """5 steps an epoch (2 with accumulation 2 and a rest), 4 epochs, validated each.

    Args:
        work_dir: Of the run.
        **changes: ``workers``, ``accumulate``, ``dataset``, ``hooks``; settings to merge into
            ``checkpoint`` (its hook), ``train_dataloader`` and ``train_cfg``; others to replace.
    """
    workers = changes.pop('workers', 0)
    loader = dict(
        batch_size=2,
        num_workers=workers,
        persistent_workers=bool(workers),
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=changes.pop('dataset', dict(type='ToyDataset')),
    )
    cfg = dict(
        default_scope='mmdet',
        work_dir=str(work_dir),
        model=dict(type='ToyModel'),
        train_dataloader={**loader, **changes.pop('train_dataloader', {})},
        val_dataloader=dict(
            batch_size=2,
            num_workers=workers,
            dataset=dict(type='ToyDataset'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg={**dict(type='ExactTrainLoop', max_epochs=4), **changes.pop('train_cfg', {})},
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type='ToyMetric'),
        optim_wrapper=dict(
            type='OptimWrapper',
            accumulative_counts=changes.pop('accumulate', 1),
            optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.01),
        ),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=7),
            dict(type='MultiStepLR', by_epoch=True, begin=0, end=4, milestones=[2], gamma=0.1),
        ],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint={
                **dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=2, save_best='score', rule='greater'),
                **changes.pop('checkpoint', {}),
            },
        ),
        custom_hooks=list(changes.pop('hooks', ())),
        env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork')),
        randomness=dict(seed=3),
        log_level='WARNING',
    )
    cfg.update(changes)
    return Config(cfg)


def train(cfg: Config, *hooks: Hook, resume: bool | Path = False) -> Runner:
    """Train, or go on; what ends the run early is raised."""
    forget_runs()
    if resume:
        cfg.resume = True
        cfg.load_from = str(weights_work_dir.candidates(Path(cfg.work_dir))[0] if resume is True else resume)
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    try:
        with stoppable(runner):
            runner.train()
    finally:
        # Left to the garbage collector, PyTorch waits 5 s for each worker.
        if not isinstance(runner._train_loop, dict):
            runner.train_dataloader._iterator = None
    return runner


def stop(
    cfg: Config, step: int | None, point: str = 'after_train_iter', number: int = signal.SIGTERM, resume: bool = False
) -> Stopped:
    """Train a run that gets a signal on its way; see `DoAt` for when."""
    with pytest.raises(Stopped) as caught:
        train(cfg, DoAt(number, step, point), resume=resume)
    assert caught.value.number == number
    return caught.value.with_traceback(None)


def names(folder: Path) -> list[str]:
    """The checkpoints of a work dir."""
    return sorted(path.name for path in Path(folder).glob('*.pth'))


def differences(one: object, other: object, at: str = '') -> list[str]:
    """Where two checkpoints differ; paths, durations and what is kept aside."""
    leaf = at.rpartition('/')[2]
    if leaf in ('cfg', 'time', 'experiment_name', 'mmengine_version', 'data_time', 'eta', 'kept') or leaf.endswith(
        ('/time', 'eta_hours')
    ):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f'{at}/{key} in one only' for key in one.keys() ^ other.keys()]
        return found + [
            line for key in one.keys() & other.keys() for line in differences(one[key], other[key], f'{at}/{key}')
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f'{at}: {len(one)} and {len(other)} entries']
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f'{at}/{i}')]
    if type(one).__name__ == 'HistoryBuffer':
        return differences([*map(np.asarray, one.data)], [*map(np.asarray, other.data)], at)
    if isinstance(one, (torch.Tensor, np.ndarray)):
        same = (
            type(one) is type(other)
            and one.shape == other.shape
            and bool(
                torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other, equal_nan=True)
            )
        )
    else:
        same = one == other
    return [] if same else [f'{at}: {one!r:.60} and {other!r:.60}']


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer, schedulers, log history, best score, recipe."""
    found = differences(read.read_checkpoint(one), read.read_checkpoint(other))
    assert not found, '\n'.join([f'{one} and {other} differ:', *found])
