"""Child processes end with their parent, and it knows what they read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfinetune.utils import processes, workers
from mmfinetune.utils.errors import Stopped
from tests.builders.errors import refused
from tests.builders.processes import alive, wait_for

POOL = """
import os, sys, time
from pathlib import Path
from mmfinetune.utils.workers import in_order

def work(item):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

if __name__ == '__main__':
    list(in_order(work, range(40), workers=3, chunk=2, wanted=False))
"""
FOLLOWER = """
import os, signal, sys, time
from mmfinetune.utils import processes
sys.platform = sys.argv[1]
child = os.fork()
if not child:
    processes.end_with_parent(os.getppid(), signal.SIGTERM)
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_a_pool_does_not_outlive_its_parent(tmp_path):
    parent = subprocess.Popen([sys.executable, '-c', POOL, str(tmp_path)])
    wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()), 5)


@pytest.mark.parametrize('platform', ('linux', 'darwin'))
def test_a_child_gets_the_signal_when_its_parent_is_killed(platform):
    parent = subprocess.Popen([sys.executable, '-c', FOLLOWER, platform], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not alive(child), 5)


def test_a_parent_that_has_ended_already():
    ended = subprocess.Popen(['true'])
    ended.wait()
    child = multiprocessing.get_context('fork').Process(target=processes.end_with_parent, args=(ended.pid,))
    child.start()
    child.join(10)
    assert child.exitcode == -signal.SIGKILL


def _read(path: Path) -> int:
    if path.name == 'stop':
        os.kill(os.getpid(), signal.SIGSTOP)
    return len(path.read_bytes())


@pytest.mark.parametrize('kind', ('a dead disk', 'a stopped process'))
def test_work_that_hangs_is_told_with_its_file(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(processes, 'TELL_S', 1)
    monkeypatch.setattr(processes, 'PATIENCE_S', 3)
    paths = [tmp_path / f'{k}.jpg' for k in range(6)]
    for path in paths:
        path.write_bytes(b'123')
    if kind == 'a dead disk':
        paths[3].unlink()
        os.mkfifo(paths[3])
    else:
        paths[3] = tmp_path / 'stop'
    before, start = {*multiprocessing.active_children()}, time.monotonic()
    with refused('workers-hang') as caught:
        list(workers.in_order(_read, paths, workers=2, chunk=1, wanted=False))
    assert time.monotonic() - start < 20
    if kind == 'a dead disk':
        assert caught.value.facts['files'] == str(paths[3])
        assert f'are at {paths[3]}' in capsys.readouterr().err
    assert {*multiprocessing.active_children()} <= before


def test_no_shared_memory_no_processes(monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(processes, 'RawArray', refuse)
    assert list(workers.in_order(str, range(9), workers=3, chunk=2, wanted=False)) == [*map(str, range(9))]


STUCK = """
import os, signal, sys, threading, time
from mmfinetune.utils.processes import Wakeup
hook = Wakeup(0.5, 'nothing was saved')
signal.signal(signal.SIGTERM, lambda *_: None)
hook.begin([signal.SIGTERM])
if sys.argv[1] == 'ends':
    os.kill(os.getpid(), signal.SIGTERM)
    hook.end()
    time.sleep(1)
    os._exit(0)
# In C, where no handler of Python is called: SIGTERM comes to another thread while this one waits.
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
import ctypes
libc = ctypes.CDLL(None)
while True:
    libc.usleep(600_000_000)
"""


@pytest.mark.parametrize(('kind', 'code'), (('stuck', 143), ('ends', 0)))
def test_a_step_that_never_ends(kind, code):
    done = subprocess.run([sys.executable, '-c', STUCK, kind], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert ('Stopped by SIGTERM' in done.stderr) == bool(code)


INTERRUPTED = """
import signal, sys, time
from mmfinetune.utils.processes import interruptible
wait = lambda: print(flush=True) or time.sleep(600)
with interruptible():
    try:
        wait()
    except KeyboardInterrupt as first:
        try:
            if sys.argv[1] == 'twice':
                signal.raise_signal(signal.SIGINT)  # at once: the same
            print(first.args[0], flush=True)
            time.sleep(1.1)
            wait()
        except KeyboardInterrupt as second:
            print(second.args[0], flush=True)
"""


@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
@pytest.mark.parametrize('kind', ('once', 'twice'))
def test_signals_interrupt_as_ctrl_c_does(number, kind):
    child = subprocess.Popen([sys.executable, '-c', INTERRUPTED, kind], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == '\n'
    child.send_signal(number)
    assert child.stdout.readline() == f'{int(number)}\n'
    assert child.stdout.readline() == '\n'
    child.send_signal(signal.SIGTERM)  # the clean-up hangs
    assert child.stdout.readline() == f'{int(signal.SIGTERM)}\n'
    assert child.wait(10) == 0
    child.stdout.close()


def test_signals_are_as_before_after_the_block():
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with processes.interruptible():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in numbers] == before


def test_hangups_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with processes.interruptible():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_has_saved_is_not_interrupted():
    with processes.interruptible():
        try:
            raise Stopped(signal.SIGTERM, None)
        except Stopped:
            signal.raise_signal(signal.SIGTERM)
