"""Joining a group of processes, and what one does for all."""

from __future__ import annotations

import datetime
import os
import socket

import pytest
import torch
from mmengine.config import Config

from mmfinetune.engine import launch, processes
from mmfinetune.utils import dist
from mmfinetune.utils.errors import UserError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith('SLURM_') or name in (
            'RANK',
            'LOCAL_RANK',
            'WORLD_SIZE',
            'MASTER_ADDR',
            'MASTER_PORT',
            launch.NODE,
            launch.LAUNCHED,
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def started(monkeypatch) -> list:
    """What groups were begun, on a machine without GPUs."""
    begun = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: begun.append((args, kwargs)))
    return begun


def place(monkeypatch, rank: int = 1, world: int = 2, **more: str) -> None:
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, **more).items():
        monkeypatch.setenv(name, str(value))


def make_cfg(**dist_cfg) -> Config:
    return Config(
        dict(
            env_cfg=dict(dist_cfg=dict(backend='nccl', **dist_cfg)),
            val_evaluator=dict(type='InstanceCocoMetric'),
            test_evaluator=[dict(type='InstanceCocoMetric', collect_device='cpu')],
        )
    )


def test_without_gpus_it_is_gloo_and_no_device(monkeypatch, started):
    place(monkeypatch)
    cfg = make_cfg()
    assert processes.join_group(cfg) == 2
    assert started == [(('gloo',), {'timeout': datetime.timedelta(hours=1)})]
    assert (cfg.launcher, cfg.env_cfg.dist_cfg.backend) == ('pytorch', 'gloo')
    assert cfg.model_wrapper_cfg.device_ids is None


def test_the_timeout_of_the_config_counts(monkeypatch, started):
    place(monkeypatch)
    processes.join_group(make_cfg(timeout=7))
    assert started[0][1] == {'timeout': datetime.timedelta(seconds=7)}


def test_with_gpus_it_is_the_backend_of_the_config(monkeypatch, started):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr('mmengine.dist.init_dist', lambda *a, **k: started.append((a, k)))
    place(monkeypatch)
    cfg = make_cfg()
    assert processes.join_group(cfg) == 2
    assert started == [(('pytorch',), {'backend': 'nccl', 'timeout': 3600})]
    assert 'model_wrapper_cfg' not in cfg


def test_a_process_without_a_gpu(monkeypatch, started):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    place(monkeypatch, rank=2, world=4)
    with pytest.raises(UserError, match='Process 2 of this machine has no GPU: PyTorch sees 2'):
        processes.join_group(make_cfg())


@pytest.mark.parametrize(
    'env',
    [{}, {'WORLD_SIZE': '4'}, {'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}],
    ids=['alone', 'cluster without torchrun', 'torchrun of one'],
)
def test_nobody_to_join(monkeypatch, started, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    cfg = make_cfg()
    assert processes.join_group(cfg) == 1
    assert started == [] and 'launcher' not in cfg


def test_results_are_collected_by_messages(monkeypatch, started):
    place(monkeypatch)
    cfg = make_cfg()
    processes.join_group(cfg)
    assert cfg.val_evaluator.collect_device == 'gpu'
    assert cfg.test_evaluator[0].collect_device == 'cpu'  # as the config says


def test_a_taken_port_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with socket.socket(socket.AF_INET6) as held:
        held.bind(('::', 0))
        held.listen()
        place(monkeypatch, rank=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=held.getsockname()[1])
        with pytest.raises(UserError, match='is taken by another program') as caught:
            processes.join_group(make_cfg())
    assert 'MASTER_PORT with srun' in caught.value.cure
    assert not torch.distributed.is_initialized()


def test_one_process_does_the_work_itself(capsys):
    assert dist.rank0_first(lambda: 7) == 7
    dist.say('seven')
    assert capsys.readouterr().out == 'seven\n'
