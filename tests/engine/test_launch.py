"""Processes of one run: started, joined, failing, stopped; and the scripts for several machines."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmfinetune.engine import compat, launch
from mmfinetune.utils.errors import Stopped
from tests.builders.errors import refused
from tests.builders.processes import alive, wait_for
from tests.builders.runs import REPO, TOOLS

DIST_TRAIN = TOOLS / 'dist_train.sh'
SLURM_TRAIN = TOOLS / 'slurm_train.sh'


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Nothing of a cluster that the tests themselves may run on."""
    for name in list(os.environ):
        if name.startswith('SLURM_') or name in (
            'RANK',
            'LOCAL_RANK',
            'WORLD_SIZE',
            'MASTER_ADDR',
            'MASTER_PORT',
            'CUDA_VISIBLE_DEVICES',
            launch.NODE,
            launch.LAUNCHED,
        ):
            monkeypatch.delenv(name)


def set_env(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


# How many processes


@pytest.mark.parametrize(
    ('gpus', 'visible', 'expected'),
    [
        (None, 0, 1),
        ('all', 0, 1),
        (None, 1, 1),
        (None, 8, 8),
        ('all', 4, 4),
        ('2', 8, 2),
        ('8', 8, 8),
        ('1', 8, 1),
        ('2', 0, 2),
    ],
)
def test_processes(monkeypatch, gpus, visible, expected):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: visible)
    assert launch.processes(gpus) == expected
    monkeypatch.setenv(launch.NODE, '1/3@10.0.0.1:29500')
    assert launch.processes(gpus) == 3 * expected


@pytest.mark.parametrize(
    ('gpus', 'visible', 'code'),
    [
        ('0', 4, 'run-gpus'),
        ('-1', 4, 'run-gpus'),
        ('two', 4, 'run-gpus'),
        ('', 4, 'run-gpus'),
        ('²', 4, 'run-gpus'),
        ('10000', 0, 'run-gpus'),
        ('5', 4, 'run-too-few-gpus'),
        ('2', 1, 'run-too-few-gpus'),
    ],
)
def test_processes_that_cannot_be(monkeypatch, gpus, visible, code):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: visible)
    with refused(code):
        launch.processes(gpus)


def test_this_machine_among_several(monkeypatch):
    assert launch.Node.of_environment() == launch.Node(0, 1)
    monkeypatch.setenv(launch.NODE, '1/2@node-a.cluster:29500')
    assert launch.Node.of_environment() == launch.Node(1, 2, 'node-a.cluster', 29500)


@pytest.mark.parametrize('text', ['2/2@a:29500', '0/2@a', '0/2@a:0', '0/2@a:70000', '0@a:1', 'x'])
def test_a_machine_that_cannot_be(monkeypatch, text):
    monkeypatch.setenv(launch.NODE, text)
    with refused('run-node', value=text):
        launch.Node.of_environment()


# Slurm


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A folder with a fake ``scontrol``, first in the PATH."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    fake(
        folder / 'scontrol',
        """
        echo "scontrol $*" >> "$(dirname "$0")/calls"
        [[ $1 != show ]] || printf 'node%s\\n' 3 4 5
        """,
    )
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
    return folder


def fake(path: Path, script: str) -> None:
    path.write_text('#!/usr/bin/env bash\n' + textwrap.dedent(script))
    path.chmod(0o755)


TASK = {
    'SLURM_STEP_NUM_TASKS': '8',
    'SLURM_LOCALID': '3',
    'SLURM_PROCID': '7',
    'SLURM_JOB_ID': '123456',
    'SLURM_JOB_NODELIST': 'node[3-5]',
}


def joined() -> dict[str, str]:
    launch.adopt_slurm()
    return {name: os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}


def test_a_task_of_srun_joins(monkeypatch, scontrol):
    set_env(monkeypatch, **TASK)
    assert launch.is_worker()
    assert joined() == {
        'RANK': '7',
        'LOCAL_RANK': '3',
        'WORLD_SIZE': '8',
        'MASTER_ADDR': 'node3',
        'MASTER_PORT': '23456',
    }
    assert (scontrol / 'calls').read_text() == 'scontrol show hostnames node[3-5]\n'


def test_what_the_user_exports_wins_over_slurm(monkeypatch, scontrol):
    set_env(monkeypatch, **TASK, MASTER_ADDR='10.0.0.9', MASTER_PORT='1234')
    found = joined()
    assert (found['MASTER_ADDR'], found['MASTER_PORT']) == ('10.0.0.9', '1234')
    assert not (scontrol / 'calls').exists()


def test_a_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch, scontrol):
    set_env(monkeypatch, **TASK, CUDA_VISIBLE_DEVICES='3')
    assert joined()['LOCAL_RANK'] == '0'


def test_a_task_that_sees_all_gpus_takes_its_own(monkeypatch, scontrol):
    set_env(monkeypatch, **TASK, CUDA_VISIBLE_DEVICES='0,1,2,3')
    assert joined()['LOCAL_RANK'] == '3'


@pytest.mark.parametrize(
    'env',
    [
        {},
        {**TASK, 'SLURM_STEP_NUM_TASKS': '1'},
        {'SLURM_JOB_ID': '5', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'},
        {**TASK, launch.NODE: '0/2@a:29500'},
    ],
    ids=['no Slurm', 'srun of one task', 'batch script', 'task that starts processes of its own'],
)
def test_who_is_alone_joins_nobody(monkeypatch, env):
    set_env(monkeypatch, **env)
    assert not launch.is_worker()
    launch.adopt_slurm()
    assert 'RANK' not in os.environ


def test_torchrun_within_srun_is_torchruns(monkeypatch):
    set_env(monkeypatch, **TASK, LOCAL_RANK='1', RANK='1')
    assert launch.is_worker()
    launch.adopt_slurm()
    assert os.environ['RANK'] == '1'


def test_no_scontrol(monkeypatch, tmp_path):
    set_env(monkeypatch, **TASK, PATH=str(tmp_path))
    with refused('run-slurm-first-node') as caught:
        launch.adopt_slurm()
    assert 'MASTER_ADDR' in caught.value.hint


# Start, fail, stop


WORKER = """
import os, signal, sys, time
from pathlib import Path
from mmfinetune.apis.cli import run
from mmfinetune.utils.errors import Stopped, UserError
rank = int(os.environ['RANK'])

def wait_for_the_end_of(other):
    path, ended = Path(f'pid{{other}}'), False
    while not ended:
        time.sleep(0.01)
        try:
            ended = ') Z' in Path(f'/proc/{{path.read_text()}}/stat').read_text()
        except OSError:
            ended = path.is_file() and path.read_text() != ''

def main():
    Path(f'pid{{rank}}').write_text(str(os.getpid()))
    {body}

run(main)
"""


@pytest.fixture
def start(tmp_path, monkeypatch, capfd) -> Callable:
    """Runs a body in processes of the launcher; what came of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'tmp'))
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr('tempfile.tempdir', None)

    def run(body: str, count: int = 2) -> SimpleNamespace:
        write_worker(tmp_path, body)
        env = dict(os.environ)
        code = launch.launch(count, ['worker.py', 'an argument'])
        assert dict(os.environ) == env
        assert list((tmp_path / 'tmp').iterdir()) == []
        pids = [int(path.read_text()) for path in tmp_path.glob('pid*')]
        # One may have been stopped before it wrote anything down.
        assert pids and not any(map(alive, pids))
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def write_worker(folder: Path, body: str) -> Path:
    path = folder / 'worker.py'
    path.write_text(WORKER.format(body=textwrap.indent(textwrap.dedent(body), '    ').strip()))
    return path


def test_all_run_with_their_place_and_the_arguments(start, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(7), raising=False)
    done = start(
        """
        env = {name: os.environ[name] for name in
               ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')}
        Path(f'env{rank}').write_text(f'{sorted(env.items())} {sys.argv[1:]}')
        """,
        count=3,
    )
    assert (done.code, done.err) == (0, '')
    for rank in range(3):
        assert (
            Path(f'env{rank}').read_text()
            == str(
                sorted({'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '3', 'OMP_NUM_THREADS': '2'}.items())
            )
            + " ['an argument']"
        )


def test_a_user_error_of_one_stops_all_and_is_shown_once(start):
    done = start("""
        if rank == 1:
            raise UserError('a-thing', 'a thing is wrong', ['here', 'there'], 'fix it')
        time.sleep(600)
        """)
    assert done.code == 2
    # Nothing else: neither the launcher's own account nor a traceback.
    assert done.err == 'error[a-thing]: a thing is wrong\n  - here\n  - there\nHint: fix it\n'


def test_a_user_error_of_all_is_shown_once(start):
    done = start("raise UserError('no-data', 'no data')")
    assert (done.code, done.err) == (2, 'error[no-data]: no data\n')


def test_a_bug_is_shown_with_its_traceback_once(start):
    done = start("""
        if rank == 0:
            raise ValueError('a bug')
        time.sleep(600)
        """)
    assert done.code == 70
    assert done.err.count('Traceback') == done.err.count('ValueError: a bug') == 1


def test_the_cause_is_shown_and_not_what_followed_from_it(start):
    done = start("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1:
            raise ValueError('the cause')
        wait_for_the_end_of(1)
        raise RuntimeError('Connection closed by peer')
        """)
    assert done.code == 70
    assert 'the cause' in done.err and 'Connection' not in done.err


def test_a_killed_process_is_named_and_not_what_its_peers_say(start):
    done = start("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_the_end_of(1)
        raise RuntimeError('Connection closed by peer')
        """)
    assert done.code == 70
    assert done.err.startswith('error[run-process-killed]: Process 1 ') and 'SIGKILL' in done.err
    assert 'Connection' not in done.err


def test_an_end_without_a_word(start):
    done = start('os._exit(7 if rank == 0 else 0)')
    assert done.code == 7
    assert done.err.startswith('error[run-process-ended]: Process 0 ') and ' 7' in done.err


def test_a_stop_is_told_by_the_run_itself(start):
    done = start('raise Stopped(15, Path("epoch_1.pth"))')
    assert done.code == 143
    assert done.err.startswith('Stopped by SIGTERM') and 'epoch_1.pth' in done.err


def test_a_stop_is_told_where_the_others_were_ended_before_they_could(start):
    done = start("""
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(600)
        raise Stopped(15, Path('epoch_1.pth'))
        """)
    assert (done.code, done.err.count('Stopped by SIGTERM'), done.err.count('epoch_1.pth')) == (143, 1, 1)


def test_a_stop_before_a_process_listens_is_told(start):
    def stop() -> None:
        wait_for(lambda: len(list(Path.cwd().glob('ready*'))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    done = start("""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        Path(f'ready{rank}').touch()
        time.sleep(600)
        """)
    assert (done.code, done.err) == (143, 'Stopped by SIGTERM\n')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_end_awaited(start, number):
    def stop() -> None:
        wait_for(lambda: len(list(Path.cwd().glob('ready*'))) == 2)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    done = start("""
        asked = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: asked.append(number))
        Path(f'ready{rank}').touch()
        while not asked:
            time.sleep(0.01)
        time.sleep(0.5)
        Path(f'saved{rank}').touch()
        raise Stopped(asked[0], Path('epoch_1.pth'))
        """)
    assert done.code == 128 + number
    assert Path('saved0').exists() and Path('saved1').exists()
    assert done.err == f'{Stopped(number, Path("epoch_1.pth"))}\n'


def test_what_goes_wrong_in_a_stop_is_told(start):
    def stop() -> None:
        wait_for(lambda: len(list(Path.cwd().glob('ready*'))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    done = start("""
        asked = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        Path(f'ready{rank}').touch()
        while not asked:
            time.sleep(0.01)
        raise UserError('not-saved', 'epoch_1.pth cannot be saved')
        """)
    assert (done.code, done.err) == (143, 'error[not-saved]: epoch_1.pth cannot be saved\n')


@pytest.mark.skipif(sys.platform != 'linux', reason='a service of the Linux kernel')
def test_nobody_runs_on_when_the_launcher_is_killed(tmp_path):
    write_worker(tmp_path, 'time.sleep(600)')
    launcher = subprocess.Popen(
        [sys.executable, '-c', "from mmfinetune.engine.launch import launch; launch(2, ['worker.py'])"],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(REPO)},
    )
    wait_for(lambda: len([p for p in tmp_path.glob('pid*') if p.read_text()]) == 2)
    launcher.kill()
    launcher.wait()
    pids = [int(path.read_text()) for path in tmp_path.glob('pid*')]
    wait_for(lambda: not any(map(alive, pids)), 20)


def failure(code: int, at: float, path: Path | None = None) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, timestamp=int(at), error_file=str(path or '<N/A>'))


def told(folder: Path, name: str, text: str, at: float) -> Path:
    path = folder / name
    path.write_text(json.dumps({'message': {'message': text, 'extraInfo': {'seconds': at}}}))
    return path


def test_peers_that_nccl_aborts_are_no_cause(tmp_path, capsys):
    # The peers may be reported in the same second, before the one that left with a message.
    failures = {
        0: failure(-signal.SIGABRT, 100),
        1: failure(-signal.SIGTERM, 100),
        2: failure(2, 101, told(tmp_path, 'e', 'error: no disk', 101)),
    }
    assert launch._show(failures) == 2
    assert capsys.readouterr().err == 'error: no disk\n'


def test_peers_that_hang_and_are_killed_by_the_launcher_are_no_cause(tmp_path, capsys):
    failures = {0: failure(-signal.SIGKILL, 131), 1: failure(1, 100, told(tmp_path, 'e', 'ValueError', 100))}
    assert launch._show(failures) == 70
    assert capsys.readouterr().err == 'ValueError\n'


def test_a_crash_is_told_by_its_signal(capsys):
    assert launch._show({0: failure(-signal.SIGSEGV, 100), 1: failure(-signal.SIGTERM, 100)}) == 70
    err = capsys.readouterr().err
    assert err.startswith('error[run-process-killed]: Process 0 ') and 'by SIGSEGV;' in err


def test_a_connection_lost_to_another_machine_says_where_to_look(tmp_path, capsys):
    path = told(tmp_path, 'e', 'Traceback\nDistBackendError: Connection closed by peer', 100)
    assert launch._show({2: failure(1, 100, path)}, alone=False) == 70
    err = capsys.readouterr().err
    assert err.startswith('error[run-machine-lost]: ') and 'DistBackendError: Connection closed' in err
    assert 'Traceback' not in err


# Under torchrun


@pytest.mark.parametrize(('rank', 'silent'), [('0', False), ('1', True)])
def test_rank_0_speaks_for_all_under_torchrun(monkeypatch, tmp_path, rank, silent):
    set_env(monkeypatch, **{compat.ERROR_FILE: str(tmp_path / 'error.json'), 'RANK': rank})
    assert launch.report('error: x', ValueError('x')) is silent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    # What torchrun's summary reads.
    read = ProcessFailure(0, 1, 2, str(tmp_path / 'error.json'))
    assert read.message['message'] == 'error: x' and abs(read.timestamp - time.time()) < 60


def test_a_process_alone_shows_its_error_itself():
    assert launch.report('error: x', ValueError('x')) is False


# Joining a group


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
    return Config(dict(env_cfg=dict(dist_cfg=dict(backend='nccl', **dist_cfg))))


def test_without_gpus_it_is_gloo_and_no_device(monkeypatch, started):
    place(monkeypatch)
    assert launch.join_group(make_cfg()) == 2
    assert started == [(('gloo',), {'timeout': datetime.timedelta(hours=1)})]


def test_the_timeout_of_the_config_counts(monkeypatch, started):
    place(monkeypatch)
    launch.join_group(make_cfg(timeout=7))
    assert started[0][1] == {'timeout': datetime.timedelta(seconds=7)}


def test_with_gpus_it_is_the_backend_of_the_config(monkeypatch, started):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr('mmengine.dist.init_dist', lambda *a, **k: started.append((a, k)))
    place(monkeypatch)
    assert launch.join_group(make_cfg()) == 2
    assert started == [(('pytorch',), {'backend': 'nccl', 'timeout': 3600})]


def test_a_process_without_a_gpu(monkeypatch, started):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    place(monkeypatch, rank=2, world=4)
    with refused('run-process-without-gpu', local=2, visible=2):
        launch.take_place()
    assert started == []


@pytest.mark.parametrize(
    'env',
    [{}, {'WORLD_SIZE': '4'}, {'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}],
    ids=['alone', 'cluster without torchrun', 'torchrun of one'],
)
def test_nobody_to_join(monkeypatch, started, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch.join_group(make_cfg()) == 1
    assert started == []


def test_a_taken_port_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with taken_port() as port:
        place(monkeypatch, rank=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        with refused('run-port-taken', port=str(port)):
            launch.join_group(make_cfg())
    assert not torch.distributed.is_initialized()


# Several machines


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET6) as held:
        held.bind(('::', 0))
        held.listen()
        yield held.getsockname()[1]


def test_a_taken_port_is_told_at_once(monkeypatch):
    with taken_port() as port:
        monkeypatch.setenv(launch.NODE, f'0/2@127.0.0.1:{port}')
        with refused('run-port-taken', host='127.0.0.1', port=port):
            launch.launch(2, ['worker.py'])


def test_a_machine_0_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(launch, 'RENDEZVOUS_TIMEOUT_S', 1)
    monkeypatch.setenv(launch.NODE, f'1/2@127.0.0.1:{free_port()}')
    with refused('run-no-meeting', host='127.0.0.1'):
        launch.launch(2, ['worker.py'])


def machines(folder: Path, *args: str | Path, count: int = 2, **env: str) -> list:
    """``dist_train.sh`` on machines that are processes of this one, with its own ``tools``."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            ['bash', str(args[0]), *map(str, args[1:])],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                'PYTHONPATH': str(REPO),
                'PYTHON': sys.executable,
                'PORT': port,
                'NNODES': str(count),
                'NODE_RANK': str(rank),
                'MASTER_ADDR': '127.0.0.1',
                'OMP_NUM_THREADS': '1',
                'CUDA_VISIBLE_DEVICES': '',  # more processes than a machine has GPUs
                **env,
            },
        )
        for rank in range(count)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=600)
        done.append(SimpleNamespace(code=process.returncode, out=out, err=err))
    return done


def with_own_tool(folder: Path, body: str) -> Path:
    """A copy of ``dist_train.sh`` beside a tool that does no more than launch ``body``."""
    script = folder / 'dist_train.sh'
    script.write_text(DIST_TRAIN.read_text())
    write_worker(folder, body)
    (folder / 'train_pretrained.py').write_text(
        'import sys\nfrom mmfinetune.apis import cli\nfrom mmfinetune.engine import launch\n'
        'cli.run(lambda: launch.launch(launch.processes(sys.argv[-1]), ["worker.py"]))\n'
    )
    return script


def test_two_machines_of_two_processes(tmp_path):
    script = with_own_tool(
        tmp_path,
        """
        Path(f'place{rank}').write_text(
            ' '.join(os.environ[n] for n in ('LOCAL_RANK', 'WORLD_SIZE', 'GROUP_RANK')))
        """,
    )
    first, second = machines(tmp_path, script, GPUS='2')
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert [(tmp_path / f'place{rank}').read_text() for rank in range(4)] == ['0 4 0', '1 4 0', '0 4 1', '1 4 1']
    assert 'Machine 1 of 0 to 1: 2 of 4 processes' in second.out


def run_script(script: Path, *args: str, cwd: Path = REPO, **env: str):
    return subprocess.run(
        ['bash', str(script), *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ('env', 'says'),
    [
        ({'NNODES': 'two'}, 'NNODES=two'),
        ({'NNODES': '0'}, 'NNODES=0'),
        ({'NNODES': '2', 'NODE_RANK': '2', 'MASTER_ADDR': 'a'}, 'NODE_RANK=2 is not between 0 and 1'),
        ({'NNODES': '2', 'NODE_RANK': '-1', 'MASTER_ADDR': 'a'}, 'NODE_RANK=-1'),
        ({'NNODES': '2', 'NODE_RANK': '0'}, 'MASTER_ADDR is not set'),
        ({'PORT': '70000'}, 'PORT=70000'),
        ({'PORT': '0'}, 'PORT=0'),
        ({'GPUS': 'x'}, 'GPUS=x'),
    ],
)
def test_dist_train_says_what_is_wrong_and_how_it_goes(env, says):
    done = run_script(DIST_TRAIN, **env)
    assert done.returncode == 2
    assert f'error: {says}' in done.stderr and 'usage: NNODES=N' in done.stderr


def test_dist_train_help():
    done = run_script(DIST_TRAIN, '--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash tools/dist_train.sh' in done.stdout


@pytest.fixture
def python(tmp_path) -> Path:
    """An interpreter that only tells what it was asked for."""
    fake(tmp_path / 'python', f'echo "{launch.NODE}=${{{launch.NODE}:-}} $*"\n')
    return tmp_path / 'python'


def test_dist_train_passes_everything_on(python):
    done = run_script(
        DIST_TRAIN,
        'a config.py',
        '--lr',
        '0.1',
        PYTHON=str(python),
        NNODES='2',
        NODE_RANK='1',
        MASTER_ADDR='10.0.0.1',
        PORT='1234',
        GPUS='4',
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == (
        f'{launch.NODE}=1/2@10.0.0.1:1234 {TOOLS}/train_pretrained.py a config.py --lr 0.1 --gpus 4\n'
    )


def test_dist_train_on_one_machine_needs_nothing(python):
    done = run_script(DIST_TRAIN, PYTHON=str(python))
    assert done.stdout == f'{launch.NODE}= {TOOLS}/train_pretrained.py --gpus all\n'


@pytest.fixture
def slurm(scontrol, python, monkeypatch) -> Path:
    """A job on three nodes; ``srun`` runs its tasks one after the other and ends with $CODE."""
    fake(
        scontrol / 'srun',
        """
        echo "srun $*" >> "$(dirname "$0")/calls"
        while [[ $1 == --* ]]; do shift; done
        for rank in 0 1 2; do SLURM_PROCID=$rank "$@" || exit; done
        exit "${CODE:-0}"
        """,
    )
    set_env(
        monkeypatch,
        PYTHON=str(python),
        SLURM_JOB_ID='123456',
        SLURM_JOB_NUM_NODES='3',
        SLURM_JOB_NODELIST='node[3-5]',
        SLURM_SUBMIT_DIR=str(REPO),
        SLURM_GPUS_ON_NODE='8',
    )
    return scontrol / 'calls'


def test_slurm_starts_one_launcher_on_each_node(slurm):
    done = run_script(SLURM_TRAIN, 'a config.py', '--amp', 'bf16')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == [
        f'{launch.NODE}={rank}/3@node3:23456 tools/train_pretrained.py a config.py --amp bf16 --gpus 8'
        for rank in range(3)
    ]
    assert '--nodes=3 --ntasks=3 --ntasks-per-node=1 --kill-on-bad-exit=1' in slurm.read_text()
    assert 'requeue' not in slurm.read_text()


def test_slurm_queues_a_stopped_run_again(slurm):
    done = run_script(SLURM_TRAIN, CODE='143')
    assert done.returncode == 143
    assert slurm.read_text().endswith('scontrol requeue 123456\n')


def test_slurm_leaves_a_failed_run(slurm):
    assert run_script(SLURM_TRAIN, CODE='2').returncode == 2
    assert 'requeue' not in slurm.read_text()


def test_slurm_resumes_a_job_that_was_queued_again(slurm):
    done = run_script(SLURM_TRAIN, 'x.py', SLURM_RESTART_COUNT='1')
    assert done.stdout.count('x.py --resume auto --gpus 8') == 3


def test_slurm_without_a_job():
    done = run_script(SLURM_TRAIN)
    assert done.returncode == 2
    assert 'submit this script with sbatch' in done.stderr and 'sbatch --nodes=2' in done.stderr


def test_slurm_asks_for_the_signal_that_saves(monkeypatch):
    text = SLURM_TRAIN.read_text()
    assert re.search(rf'^#SBATCH --signal=TERM@{launch.STOP_TIMEOUT_S}$', text, re.M)
    assert '\n#SBATCH --requeue\n' in text and '\n#SBATCH --ntasks-per-node=1\n' in text
