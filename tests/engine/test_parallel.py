"""What several processes compute is what one computes; on the CPU with gloo."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook

from tests.builders.runs import (
    REPO,
    TOOLS,
    VAL_IMAGES,
    Outcome,
    inside,
    make_site,
    spawn,
    train_tool,
    write_tiny_config,
)

# MMEngine's visualizer, of boxes that end at the image's edge.
pytestmark = pytest.mark.filterwarnings('ignore:.*out of bounds')

TRAIN = TOOLS / 'train_pretrained.py'
# Steps of one image. Only epochs change the learning rate: a warm-up by steps has another one at
# the second of two accumulated steps than at the one step of two processes.
STEPS_OF_ONE = """
train_dataloader.update(batch_size=1)
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[3], gamma=0.1)]
train_cfg = dict(max_epochs=5, val_interval=5)
val_cfg = dict(loss=False)
default_hooks.update(checkpoint=dict(interval=4))
"""
TROUBLE = """
default_hooks.update(trouble=dict(type='TroubleHook', kind={kind!r}))
"""


@HOOKS.register_module(force=True)
class TroubleHook(Hook):
    """Makes trouble on the last process, in step 2."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if get_rank() != get_world_size() - 1 or runner.iter != 1:
            return
        if self.kind == 'poison':
            data_batch['inputs'][0] = data_batch['inputs'][0].float() * float('nan')
        if self.kind == 'memory':
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nMore')


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('site')
    weights = make_site(folder)
    write_tiny_config(folder / 'ones.py', weights=weights, extra=STEPS_OF_ONE)
    write_tiny_config(
        folder / 'remap.py',
        base='mask_rcnn_demo_remap.py',
        side=224,
        weights=next((REPO / 'pretrain').glob('mask_rcnn_demo_coco80-*.pth')),
    )
    for kind in ('poison', 'memory'):
        write_tiny_config(
            folder / f'{kind}.py',
            weights=weights,
            extra='train_dataloader.update(batch_size=2)\n' + TROUBLE.format(kind=kind),
        )
    return folder


def one_of_many(rank: int, world: int, port: int, folder: str, args: tuple, out) -> None:
    """Run the tool as one process of a group; the work of a child."""
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        OMP_NUM_THREADS='1',
    )
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    out.send(train_tool(*args))


@pytest.fixture(scope='module')
def nursery():
    """A process that has imported mmdet, and from which others are forked in no time.

    This one cannot be forked: hotcoco may have started threads, which would not be there.
    """
    context = multiprocessing.get_context('forkserver')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(REPO))
        context.set_forkserver_preload(['tests.engine.test_parallel', 'mmfinetune.register'])
        context.Process(target=int).start()
    return context


@pytest.fixture
def processes(nursery, site, monkeypatch) -> Callable:
    """The training tool in several processes of one group, in the site's folder."""
    monkeypatch.chdir(site)

    def run(count: int, *args: str | Path) -> list[Outcome]:
        port = free_port()
        pipes = [nursery.Pipe(duplex=False) for _ in range(count)]
        started = [
            nursery.Process(target=one_of_many, args=(rank, count, port, str(site), args, out))
            for rank, (_, out) in enumerate(pipes)
        ]
        for process, (_, out) in zip(started, pipes, strict=True):
            process.start()
            out.close()  # so that the other end tells when the process has died
        try:
            return [into.recv() if into.poll(300) else pytest.fail('no answer') for into, _ in pipes]
        finally:
            for process in started:
                process.join(10)
                process.kill()

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def read(path: Path | str) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def largest_difference(first: Path | str, second: Path | str) -> float:
    """Of the parameters of two checkpoints; BN statistics are those of one process's images."""
    first, second = read(first)['state_dict'], read(second)['state_dict']
    assert set(first) == set(second)
    return max(
        float((first[name] - second[name]).abs().max())
        for name in first
        if 'running_' not in name and 'num_batches' not in name
    )


def test_two_processes_learn_what_one_with_accumulation_learns(processes):
    first, second = processes(2, 'ones.py', '--train', '--work-dir', 'two')
    assert (first.code, second.code) == (0, 0), first.err + second.err
    alone = train_tool('ones.py', '--train', '--work-dir', 'one', '--accumulate', '2')
    assert alone.code == 0, alone.err
    assert 'Batch: 2 images an update (2 GPU x 1 x 1 accumulation)' in first.out
    assert 'Batch: 2 images an update (1 GPU x 1 x 2 accumulation)' in alone.out
    assert read('two/epoch_5.pth')['meta']['iter'] == 20
    assert read('one/epoch_5.pth')['meta']['iter'] == 40
    difference = largest_difference('two/epoch_5.pth', 'one/epoch_5.pth')
    moved = largest_difference('two/epoch_5.pth', 'two/epoch_4.pth')
    print(
        f'largest difference of a parameter after 20 steps: {difference:.1e}, largest change in the last 4: {moved:.1e}'
    )
    assert difference < 1e-5 and moved > 10 * difference
    # Rank 0 speaks for both.
    assert 'lr: ' in first.out and 'lr: ' not in second.out


def test_any_number_of_processes_measures_the_same(processes):
    assert VAL_IMAGES % 3 and not VAL_IMAGES % 2
    found = {}
    for count in (1, 2, 3):
        # The demo's weights find something untrained, or all numbers would be 0.
        outcomes = processes(count, 'remap.py', '--test', '--head-init', 'remap', '--work-dir', f'test{count}')
        assert not any(o.code for o in outcomes), outcomes[0].err
        found[count] = json.loads(Path(f'test{count}/zero_shot.json').read_text())['metrics']
    names = [n for n in found[1] if re.fullmatch(r'coco/(bbox|segm)_(mAP|AR)(_\w+|@\d+)*', n)]
    assert len(names) >= 24 and found[1]['test/loss'] > 0
    assert any(found[1][name] > 0 for name in names)
    # To the last digit.
    assert found[2] == found[1] and found[3] == found[1]


def test_a_loss_of_one_that_is_not_finite_stops_all_and_its_images_are_named(processes):
    first, second = processes(2, 'poison.py', '--train', '--work-dir', 'poison')
    assert (first.code, second.code) == (2, 2)
    # Both say the same, so that it does not matter whose message is shown.
    assert first.error == second.error == 'nonfinite-step'
    assert first.err.partition('error[')[2] == second.err.partition('error[')[2]
    note = json.loads(Path('poison/bad_batch.json').read_text())
    assert (note['step'], note['epoch']) == (2, 1)
    assert [loss['rank'] for loss in note['bad_losses']] == [1] and len(note['images']) == 2
    assert not Path('poison/epoch_1.pth').exists()


def test_all_skip_a_bad_step_of_one(processes):
    outcomes = processes(
        2,
        'poison.py',
        '--train',
        '--work-dir',
        'skip',
        '--cfg-options',
        'default_hooks.nonfinite.nan_policy=skip',
        'train_cfg.max_epochs=1',
    )
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].err + outcomes[1].err
    note = json.loads(Path('skip/bad_batch.json').read_text())
    assert (note['step'], note['epoch']) == (2, 1)
    state = read('skip/epoch_1.pth')['state_dict']
    assert all(torch.isfinite(value).all() for value in state.values())


def test_memory_that_runs_out_is_told_with_what_helps(site):
    with inside(site):
        outcome = train_tool('memory.py', '--train', '--work-dir', 'memory')
    assert (outcome.code, outcome.error) == (2, 'out-of-memory')
    assert 'Traceback' not in outcome.err
    assert 'CUDA out of memory. Tried to allocate 2.00 GiB.' in outcome.err
    for cure in (
        '--batch-size 1 --accumulate 2: the same recipe at 50%',
        '--amp bf16',
        'scale=(67, 67) instead of (96, 96)',
        'model.backbone.with_cp=True',
    ):
        assert cure in outcome.err


# Real processes

TROUBLE_MODULE = """
import os, signal
from mmdet.registry import HOOKS
from mmengine.dist import get_rank
from mmengine.hooks import Hook

@HOOKS.register_module()
class KillHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 1 and runner.iter == 2 and not os.path.exists('killed'):
            open('killed', 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def python_processes() -> set[int]:
    """Of this machine's training tool."""
    found = set()
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if str(TRAIN).encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_then_goes_on(site, tmp_path, monkeypatch):
    (tmp_path / 'trouble.py').write_text(TROUBLE_MODULE)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    before = python_processes()
    with inside(site):
        write_tiny_config(
            Path('kill.py'),
            weights=next(Path('pretrain').glob('*.pth')),
            extra='train_dataloader.update(batch_size=2)\n'
            "custom_imports = dict(imports=['mmfinetune.register', 'trouble'])\n"
            "default_hooks.update(kill=dict(type='KillHook'))\n",
        )
        args = (TRAIN, 'kill.py', '--train', '--gpus', '2', '--work-dir', tmp_path / 'run')
        start = time.monotonic()
        outcome = spawn(*args, timeout=500)
        took = time.monotonic() - start
        assert outcome.code == 70
        assert 'Starting 2 processes' in outcome.out
        assert outcome.err.count('error[') == 1 and 'Traceback' not in outcome.err
        assert outcome.error == 'run-process-killed' and 'Process 1 ' in outcome.err
        assert python_processes() <= before
        resumed = spawn(*args, '--resume', timeout=500)
    assert resumed.code == 0, resumed.err[-2000:]
    assert read(tmp_path / 'run/epoch_2.pth')['meta']['iter'] == 4
    print(f'start to end of the killed run: {took:.0f} s')


@contextlib.contextmanager
def two_networks() -> Iterator[list[tuple[str, list[str], str]]]:
    """Address, command prefix and interface of two machines: network namespaces, if we may."""
    names = [f'mmft{os.getpid()}{i}' for i in 'ab']
    addresses = ['10.99.0.1', '10.99.0.2']

    def ip(*args: str) -> bool:
        return subprocess.run(['ip', *args], capture_output=True, check=False).returncode == 0

    try:
        made = (
            shutil.which('ip')
            and all(ip('netns', 'add', name) for name in names)
            and ip('link', 'add', 'wa', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'wb', 'netns', names[1])
        )
        if not made:
            yield [('127.0.0.1', [], 'lo'), ('127.0.0.2', [], 'lo')]
            return
        machines = []
        for name, address, wire in zip(names, addresses, ('wa', 'wb'), strict=True):
            assert ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', wire)
            assert ip('-n', name, 'link', 'set', wire, 'up')
            assert ip('-n', name, 'link', 'set', 'lo', 'up')
            machines.append((address, ['ip', 'netns', 'exec', name], wire))
        yield machines
    finally:
        for name in names:
            ip('netns', 'del', name)


def on_machines(machines: list, *args: str | Path) -> list[Outcome]:
    """``dist_train.sh`` with one process on each machine."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [*prefix, 'bash', str(TOOLS / 'dist_train.sh'), *map(str, args)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                'PYTHON': sys.executable,
                'NNODES': str(len(machines)),
                'NODE_RANK': str(rank),
                'MASTER_ADDR': machines[0][0],
                'PORT': port,
                'GPUS': '1',
                'OMP_NUM_THREADS': '1',
                'CUDA_VISIBLE_DEVICES': '',
                'GLOO_SOCKET_IFNAME': wire,
            },
        )
        for rank, (_, prefix, wire) in enumerate(machines)
    ]
    outcomes = []
    for process in started:
        out, err = process.communicate(timeout=500)
        outcomes.append(Outcome(process.returncode, out, err))
    return outcomes


@pytest.mark.slow
def test_two_machines_train_together_and_fail_together(site, tmp_path):
    with inside(site), two_networks() as machines:
        print('machines:', *(address for address, *_ in machines))
        first, second = on_machines(
            machines, 'tiny.py', '--work-dir', tmp_path / 'run', '--cfg-options', 'train_cfg.max_epochs=1'
        )
        assert (first.code, second.code) == (0, 0), first.err + second.err
        assert 'lr:    0.04 = 0.02 x (2 GPU x 4 images x 1 accumulation) / 4' in first.out
        assert 'Machine 1 of 0 to 1: 1 of 2 processes' in second.out
        assert 'segm AP50 =' in first.out and 'segm AP50 =' not in second.out
        assert (
            read(tmp_path / 'run/epoch_1.pth')['message_hub']['runtime_info']['mmfinetune']['batch_setup']['processes']
            == 2
        )
        # What is wrong for all is shown on each machine, with the right exit code.
        for outcome in on_machines(machines, 'tiny.py', '--resume', '--work-dir', tmp_path / 'no'):
            assert outcome.code == 2 and outcome.err.count('error[') == 1
            assert outcome.error == 'resume-nothing'
