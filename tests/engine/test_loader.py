"""Loading processes that hang, find no shared memory, or lose the main process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS
from torch.utils.data import DataLoader

from mmfinetune.engine import loader, train_loop
from mmfinetune.engine.loader import watched
from mmfinetune.utils.errors import Message, Stopped
from mmfinetune.utils.processes import Readers
from mmfinetune.weights import read
from tests.builders.errors import refused
from tests.builders.processes import alive, wait_for
from tests.builders.toy import DoAt, ToyDataset, assert_same_checkpoint, make_cfg, train


@DATASETS.register_module(force=True)
class Files(ToyDataset):
    """Reads a file for each sample; where there is none it sends a signal to itself."""

    def __init__(self, folder: str, size: int = 0) -> None:
        super().__init__(10)
        self.folder, self.size = folder, size

    def __getitem__(self, index: int) -> dict:
        path = Path(self.folder, f'{index}.txt')
        if not path.exists():
            os.kill(os.getpid(), signal.SIGSTOP)
        value = float(path.read_bytes())
        return {**super().__getitem__(index), **({'more': torch.full((self.size,), value)} if self.size else {})}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / 'files').mkdir()
    for index in range(10):
        (tmp_path / f'files/{index}.txt').write_text(str(index))
    return tmp_path / 'files'


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    yield
    Readers.kill_all()


@pytest.fixture
def impatient(monkeypatch) -> list[Message]:
    """Looks more often; what is said."""
    said: list[Message] = []
    monkeypatch.setattr(loader, 'POLL_S', 0.2)
    monkeypatch.setattr(loader, 'TELL_S', 0.5)
    monkeypatch.setattr(loader, 'warn', said.append)
    return said


def load(folder: Path, **settings) -> DataLoader:
    return watched(DataLoader(Files(str(folder), settings.pop('size', 10)), collate_fn=list, **settings))


def dead_disk(folder: Path, index: int) -> Path:
    """A file whose reader waits for ever."""
    path = folder / f'{index}.txt'
    path.unlink()
    os.mkfifo(path)
    return path


@pytest.mark.parametrize('persistent', (False, True))
def test_a_process_that_hangs_is_told_with_its_file(folder, impatient, persistent):
    path = dead_disk(folder, 5)
    batches = load(folder, batch_size=2, num_workers=2, timeout=2, persistent_workers=persistent)
    seen, start = [], time.monotonic()
    with refused('loader-hangs', files=str(path)):
        for batch in batches:
            seen.append([int(sample['data_samples']) for sample in batch])
    assert seen == [[0, 1], [2, 3]] and 2 <= time.monotonic() - start < 10
    assert [(m.code, m.facts['files'], m.facts['patience']) for m in impatient] == [('loader-waits', str(path), 2)]


def test_a_slow_disk_loses_nothing(folder, impatient):
    path = dead_disk(folder, 5)
    writer = subprocess.Popen(['sh', '-c', f'sleep 1; echo 5 > {path}'])
    found = [float(s['more'][0]) for batch in load(folder, batch_size=2, num_workers=2, timeout=60) for s in batch]
    writer.wait()
    assert found == [*range(10)] and impatient[-1].facts['files'] == str(path)


def test_without_processes_a_hang_ends_too(folder, impatient):
    dead_disk(folder, 5)
    with refused('loader-hangs'):
        list(load(folder, batch_size=2, num_workers=0, timeout=1))


def test_the_alarm_is_given_back(folder):
    def mine(*_: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, mine)
    try:
        assert len(list(load(folder, batch_size=2, num_workers=1))) == 5
        assert signal.getsignal(signal.SIGALRM) is mine and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize('kind', ('a dead disk', 'a stopped process'))
def test_a_signal_while_no_batch_comes_saves_the_run(folder, impatient, tmp_path, kind):
    def break_disk(runner) -> None:
        for index in range(10):
            (folder / f'{index}.txt').unlink()
            if kind == 'a dead disk':
                os.mkfifo(folder / f'{index}.txt')
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def cfg(name: str):
        return make_cfg(tmp_path / name, dataset=dict(type='Files', folder=str(folder)), workers=1)

    train(cfg('whole'))
    with pytest.raises(Stopped) as caught:
        train(cfg('run'), DoAt(break_disk, 5))
    assert caught.value.number == signal.SIGTERM
    assert 6 <= read.read_checkpoint(caught.value.checkpoint)['meta']['iter'] < 10
    for index in range(10):
        (folder / f'{index}.txt').unlink(missing_ok=True)
        (folder / f'{index}.txt').write_text(str(index))
    train(cfg('run'), resume=True)
    assert_same_checkpoint(tmp_path / 'whole/epoch_4.pth', tmp_path / 'run/epoch_4.pth')


# No shared memory


def test_batches_come_by_pipe_where_shared_memory_is_full(folder, impatient, monkeypatch):
    expected = [s for batch in load(folder, batch_size=2, num_workers=0) for s in batch]

    def full(*_: object) -> None:
        raise RuntimeError(
            'unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)'
        )

    # In the processes, which are forked from this one.
    monkeypatch.setattr(torch.UntypedStorage, '_share_fd_cpu_', full)
    monkeypatch.setattr(loader, '_told', [])
    found = [s for batch in load(folder, batch_size=2, num_workers=2) for s in batch]
    assert all(torch.equal(a['more'], b['more']) for a, b in zip(expected, found, strict=True))
    assert [m.code for m in impatient] == ['shared-memory-full']


def test_a_batch_that_cannot_be_sent_at_all_ends_the_run(folder, impatient, capfd):
    batches = load(folder, batch_size=2, num_workers=1)
    batches.collate_fn = lambda samples: lambda: samples
    with refused('run-worker-killed'), train_loop.translate_system_errors():
        list(batches)
    assert 'PicklingError' in capfd.readouterr().err or True


SHARED = """
import sys
import torch
from torch.utils.data import DataLoader
from mmfinetune.apis import cli
from mmfinetune.engine.loader import watched

class Images:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return {'inputs': torch.full((3, 500, 500), index, dtype=torch.uint8)}

def main():
    for batch in watched(DataLoader(Images(), batch_size=2, num_workers=2, collate_fn=list)):
        print([int(sample['inputs'].float().mean()) for sample in batch], flush=True)

cli.run(main)
"""


@pytest.mark.parametrize('options', ('size=1m', 'ro', 'size=4k'), ids=('small', 'read-only', 'full'))
def test_dev_shm_itself(options):
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm'
    if subprocess.run(['unshare', '-m', 'sh', '-c', mount], check=False).returncode:
        pytest.skip('cannot mount here')
    fill = 'head -c 4096 /dev/zero > /dev/shm/full' if options == 'size=4k' else 'true'
    done = subprocess.run(
        ['unshare', '-m', 'sh', '-c', f'{mount}; {fill}; exec "$@"', 'sh', sys.executable, '-c', SHARED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if options == 'size=1m':
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if line.startswith('[')] == [
            '[0, 1]',
            '[2, 3]',
            '[4, 5]',
            '[6, 7]',
        ]
        assert (done.stdout + done.stderr).count('--shm-size') == 1
    else:
        assert done.returncode == 2 and 'error[shared-memory]: ' in done.stderr and '--shm-size' in done.stderr
        assert 'Traceback' not in done.stderr


# The main process is killed

LOADING = """
import os, sys, time
from collections.abc import Iterator
from pathlib import Path
from torch.utils.data import DataLoader
from mmfinetune.engine.loader import watched

class Slow:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        Path(sys.argv[1], str(os.getpid())).touch()
        return bytes(2 ** 20) if index < 4 else time.sleep(600)

list(watched(DataLoader(Slow(), num_workers=2, collate_fn=list)))
"""


def test_loading_processes_do_not_outlive_the_main_process(tmp_path):
    parent = subprocess.Popen([sys.executable, '-c', LOADING, str(tmp_path)])
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()), 5)
