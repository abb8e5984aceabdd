"""One run at a time in a work dir: real processes that hold the lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmfinetune.utils import run_lock
from mmfinetune.utils.run_lock import RunLock
from tests.builders.errors import refused

HOLD = """
import sys
from pathlib import Path
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.run_lock import RunLock
with RunLock() as lock:
    try:
        lock.take(Path(sys.argv[1]))
        print('taken', flush=True)
    except UserError as error:
        print(error.code, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Starts processes that take the lock and hold it until their input ends; `said` is what they say."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, '-c', HOLD, str(folder)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def take(folder: Path) -> None:
    with RunLock() as lock:
        lock.take(folder)


def test_a_second_run_is_told_who_has_the_folder(tmp_path, hold):
    first = hold(tmp_path / 'new/run')
    assert said(first) == 'taken'
    with refused('run-going-on', work_dir=tmp_path / 'new/run', pid=first.pid, host=socket.gethostname()):
        take(tmp_path / 'new/run')
    (tmp_path / 'link').symlink_to(tmp_path / 'new')
    with refused('run-going-on', pid=first.pid):
        take(tmp_path / 'link/run')
    first.communicate()
    assert not (tmp_path / 'new/run/run.lock').exists()
    take(tmp_path / 'new/run')


def test_of_many_at_once_one_has_it(tmp_path, hold):
    holders = [hold(tmp_path / 'deep/er/run') for _ in range(8)]
    assert sorted(map(said, holders)) == ['run-going-on'] * 7 + ['taken']


def test_each_of_many_has_it_in_turn(tmp_path):
    # The file is removed by one while others open it.
    code = HOLD.replace('    sys.stdin.read()\n', '') + '\nassert not lock._path.exists() or True\n'
    script = f'import itertools\nfor _ in range(200):\n{"".join("    " + line + chr(10) for line in code.splitlines())}'
    runs = [
        subprocess.Popen([sys.executable, '-c', script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [run.communicate()[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert all(len(words) == 200 and {*words} <= {'taken', 'run-going-on'} for words in outputs)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, hold):
    first = hold(tmp_path)
    assert said(first) == 'taken'
    first.kill()
    first.wait()
    assert (tmp_path / 'run.lock').exists()
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('free', (True, False), ids=('with locks', 'file system without locks'))
def test_a_file_of_another_machine(tmp_path, monkeypatch, free):
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')

    if not free:
        monkeypatch.setattr(fcntl, 'lockf', no_locks)
    file = tmp_path / 'run.lock'
    text = json.dumps({'host': 'node7', 'pid': 1, 'since': 'today', 'command': 'train', 'job': '5'})
    file.write_text(text)
    with refused('run-elsewhere', host='node7', pid=1, lock=file, here=socket.gethostname()):
        take(tmp_path)
    assert file.read_text() == text
    # Slurm queues a job again when it has ended.
    monkeypatch.setenv('SLURM_JOB_ID', '5')
    with refused('run-elsewhere'):
        take(tmp_path)
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    take(tmp_path)


def test_without_locks_the_process_id_counts(tmp_path, monkeypatch, hold):
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'lockf', no_locks)
    first = hold(tmp_path)
    assert said(first) == 'taken'
    with refused('run-going-on', pid=first.pid):
        take(tmp_path)
    first.kill()
    first.wait()
    take(tmp_path)


@pytest.mark.parametrize('text', ('', 'rubbish', '[]', '{"host": 5}', '\0' * 9))
def test_a_file_that_no_run_wrote_is_replaced(tmp_path, text):
    (tmp_path / 'run.lock').write_text(text)
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / 'precious').write_text('precious')
    (tmp_path / 'run.lock').symlink_to('precious')
    with refused('file-not-writable'):
        take(tmp_path)
    assert (tmp_path / 'precious').read_text() == 'precious'


def test_taken_again_by_the_same_run_and_gone_at_its_end(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path)
        written = (tmp_path / 'run.lock').read_text()
        assert json.loads(written)['pid'] == os.getpid()
        lock.take(tmp_path)
        assert (tmp_path / 'run.lock').read_text() == written
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_removed_meanwhile(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path / 'run')
        (tmp_path / 'run/run.lock').unlink()
        (tmp_path / 'run').rmdir()
    assert run_lock.NAME not in {path.name for path in tmp_path.rglob('*')}
