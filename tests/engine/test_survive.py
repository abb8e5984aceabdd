"""Real runs that are killed, stopped, starved of disk and of good images, and go on."""

from __future__ import annotations

import collections
import contextlib
import csv
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmfinetune.data import demo
from mmfinetune.engine import checkpoints
from mmfinetune.utils.errors import UserError
from mmfinetune.weights import read
from mmfinetune.weights import work_dir as weights_work_dir
from tests.builders import voc
from tests.builders.curves import curves
from tests.builders.disk import nearly_full
from tests.builders.errors import refused
from tests.builders.processes import marked, wait_for
from tests.builders.runs import TOOLS, Outcome, drive, inside, make_site, write_tiny_config
from tests.builders.toy import assert_same_checkpoint, names

EPOCHS, STEPS = 4, 10  # 40 images / batch of 4
LAST = f'epoch_{EPOCHS}.pth'
MORE = """
demo_data = dict(num_train=40, num_val=8)
train_dataloader.update(num_workers=2, persistent_workers=True)
val_dataloader.update(num_workers=1)
test_dataloader.update(num_workers=0)
param_scheduler.append(dict(type='MultiStepLR', by_epoch=True, milestones=[2], gamma=0.1))
"""
# Generous, since the machine may have other work to do.
PATIENCE = 240
IMPORTED = [
    'mmfinetune.register',
    'mmfinetune.apis.train',
    'mmfinetune.evaluation.plots',
    'mmdet.apis',
    'torch.utils.tensorboard',
    'hotcoco',
    'runpy',
]


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """A folder to work in: 40 images of 96 px, 4 epochs of 10 steps; the demo but for its size."""
    folder = tmp_path_factory.mktemp('site')
    weights = make_site(folder, data=False)
    devkit = demo.make_voc(folder / 'data/demo', 40, 8, progress=False)
    voc.convert(devkit, devkit / 'annotations', workers=1, progress=False)
    write_tiny_config(folder / 'tiny.py', weights=weights, epochs=EPOCHS, extra=MORE)
    return folder


def _in_child(folder: Path, log: Path, args: list[str], write_seconds: float) -> None:
    os.setsid()
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sync = os.fsync
    os.fsync = lambda fd: (time.sleep(write_seconds), sync(fd))
    sys.argv = ['train_pretrained.py', *args]
    runpy.run_path(str(TOOLS / 'train_pretrained.py'), run_name='__main__')


class Run:
    """``tools/train_pretrained.py`` in a process group of its own.

    Forked from a server that has done the imports, which else take most of the time.

    Args:
        folder: To work in.
        *args: Of the tool.
        work_dir: Its log, of all runs there, is in the folder.
        write_seconds: Lengthens each write, so that a kill finds one going on.
    """

    def __init__(self, folder: Path, *args: str, work_dir: Path, write_seconds: float = 0) -> None:
        self.work_dir = work_dir
        self.log = folder / (str(work_dir).replace('/', '_') + '.log')
        self._start = self.log.stat().st_size if self.log.exists() else 0
        # What MMEngine says of each step tells when to interrupt it.
        args = ('tiny.py', '--verbose', '--gpus', '1', '--work-dir', str(work_dir), *args)
        with pytest.MonkeyPatch.context() as patch:
            # Sums depend on the number of threads.
            patch.setenv('OMP_NUM_THREADS', '1')
            context = multiprocessing.get_context('forkserver')
            context.set_forkserver_preload(IMPORTED)
            self.process = context.Process(target=_in_child, args=(folder, self.log, list(args), write_seconds))
            self.process.start()

    @property
    def text(self) -> str:
        """What this run has printed."""
        if not self.log.exists():
            return ''
        return self.log.read_bytes()[self._start :].decode(errors='replace')

    @property
    def error(self) -> str | None:
        """The code of the error that it ended with."""
        return Outcome(0, '', self.text).error

    def step(self) -> int:
        """The last step of the log; 0 before the first."""
        found = re.findall(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/', self.text)
        return (int(found[-1][0]) - 1) * STEPS + int(found[-1][1]) if found else 0

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), f'ended early:\n{self.text[-2000:]}'
            assert time.monotonic() < end, f'waited in vain:\n{self.text[-2000:]}'
            time.sleep(0.002)

    def workers(self) -> list[int]:
        """The processes that load its data."""
        found = subprocess.run(['pgrep', '-P', str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def signal(self, number: int) -> None:
        """To all its processes, as Ctrl-C and Slurm do."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, self.text[-2000:]
        return self.process.exitcode


def whole_files(work_dir: Path) -> list[str]:
    """The checkpoints, each of which can be read."""
    for name in names(work_dir):
        read.read_checkpoint(work_dir / name)
    return names(work_dir)


@pytest.fixture(scope='module')
def uninterrupted(site) -> Path:
    folder = site / 'uninterrupted'
    run = Run(site, '--train', work_dir=folder)
    assert run.end() == 0, run.text[-2000:]
    return folder


def curves_of(work_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All points that TensorBoard shows; times aside."""
    found = curves(work_dir / 'tensorboard_logs')
    return {tag: points for tag, points in found.items() if '/7_time/' not in tag}


def rows(work_dir: Path) -> list[dict[str, str]]:
    """Of results.csv; times aside."""
    with (work_dir / 'results.csv').open() as file:
        return [
            {key: value for key, value in row.items() if not key.endswith('seconds')} for row in csv.DictReader(file)
        ]


def assert_same_run(work_dir: Path, other: Path) -> None:
    for name in (LAST, *(n for n in names(other) if n.startswith('best'))):
        assert_same_checkpoint(other / name, work_dir / name)
    assert names(work_dir) == names(other)
    assert rows(work_dir) == rows(other)
    found, expected = curves_of(work_dir), curves_of(other)
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert found[tag] == points, tag


def kills(rng: random.Random) -> Iterator[tuple[str, int]]:
    """In each epoch: within a step, three writes, and the validation."""
    for epoch in range(EPOCHS):
        start = epoch * STEPS
        yield 'step', start + rng.randint(1, 4)
        yield 'write within the epoch', start + 5
        yield 'write after the epoch', start + STEPS
        yield 'validation', start + STEPS
        yield 'write after the validation', start + STEPS


def moment(run: Run, phase: str, step: int) -> Callable[[], object]:
    """Whether the moment for a kill has come."""
    saved = re.compile(rf'Saving checkpoint at {step // STEPS} epochs|validating it now')
    scored = re.compile(rf'Epoch\(val\) \[{step // STEPS}\].*segm_mAP:')

    def writing(name: str) -> bool:
        return any(run.work_dir.glob(f'.{name}.pth.*.tmp'))

    return {
        'step': lambda: run.step() >= step,
        'write within the epoch': lambda: run.step() >= step - 3 and writing('iter_*'),
        'write after the epoch': lambda: writing(f'epoch_{step // STEPS}'),
        'validation': lambda: saved.search(run.text) and (run.work_dir / f'epoch_{step // STEPS}.pth').exists(),
        'write after the validation': lambda: scored.search(run.text) and writing('*'),
    }[phase]


@pytest.mark.slow
def test_twenty_kills_change_nothing(site, uninterrupted, tmp_path):
    rng = random.Random(0)
    work_dir = tmp_path / 'run'
    resumed, lost, half_written = 0, 0, 0
    for phase, step in kills(rng):
        saved = weights_work_dir.candidates(work_dir)
        resumed += bool(saved)
        run = Run(
            site,
            '--train',
            '--save-every',
            '3',
            *['--resume'] * bool(saved),
            work_dir=work_dir,
            write_seconds=0.2 if 'write' in phase else 0,
        )
        run.wait_for(moment(run, phase, step))
        time.sleep(rng.uniform(0, 0.3 if phase in ('step', 'validation') else 0.15))
        run.signal(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        whole_files(work_dir)
        half_written += bool(list(work_dir.glob('.*.pth.*.tmp')))
        newest = weights_work_dir.candidates(work_dir)
        done = read.read_checkpoint(newest[0])['meta']['iter'] if newest else 0
        lost += max(0, run.step() - done)
        print(f'killed at step {run.step() or done}, {phase}: {done} steps are saved')
    run = Run(site, '--train', '--save-every', '3', '--resume', work_dir=work_dir)
    assert run.end() == 0, run.text[-2000:]
    assert_same_run(work_dir, uninterrupted)
    assert not list(work_dir.rglob('.*.tmp'))
    assert resumed >= 18 and half_written >= 8
    print(
        f'20 kills, {resumed + 1} resumes, {half_written} within a write, 0 unreadable '
        f'checkpoints, {lost} steps done again; final weights and optimizer: the same bits'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'code', 'when'),
    [
        (signal.SIGTERM, 143, 'step'),
        (signal.SIGINT, 130, 'step'),
        (signal.SIGTERM, 143, 'validation'),
        (signal.SIGINT, 130, 'start'),
    ],
)
def test_signal_saves_and_ends_cleanly(site, uninterrupted, tmp_path, number, code, when):
    work_dir = tmp_path / 'run'
    run = Run(site, '--train', work_dir=work_dir)
    run.wait_for(
        {
            'step': lambda: run.step() >= STEPS + 3,
            'validation': lambda: 'Saving checkpoint at 2 epochs' in run.text,
            'start': run.workers,
        }[when]
    )
    run.signal(number)
    assert run.end() == code, run.text[-2000:]
    assert 'Traceback' not in run.text
    assert re.search(rf'Stopped by {signal.Signals(number).name}, saved in .*--resume', run.text)
    whole_files(work_dir)
    run = Run(site, '--train', '--resume', work_dir=work_dir)
    assert run.end() == 0
    assert_same_run(work_dir, uninterrupted)


@pytest.mark.slow
def test_killed_worker_ends_the_run_with_a_message(site, uninterrupted, tmp_path):
    work_dir = tmp_path / 'run'
    run = Run(site, '--train', work_dir=work_dir)
    run.wait_for(lambda: run.step() >= STEPS + 2)
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.end() == 2, run.text[-2000:]
    assert 'Traceback' not in run.text
    assert run.error == 'run-worker-killed' and 'epoch_1.pth' in whole_files(work_dir)
    assert Run(site, '--train', '--resume', work_dir=work_dir).end() == 0
    assert_same_run(work_dir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    'spoil',
    (
        lambda data: b'',
        lambda data: data[: len(data) // 2],
        lambda data: b'\0' * len(data),
        lambda data: b'<html>' + data[6:],
    ),
    ids=('empty', 'truncated', 'zeros', 'garbage'),
)
def test_damaged_newest_checkpoint(site, uninterrupted, tmp_path, spoil):
    work_dir = tmp_path / 'run'
    run = Run(site, '--train', work_dir=work_dir)
    run.wait_for(lambda: run.step() >= 2 * STEPS + 2)
    run.signal(signal.SIGTERM)
    run.end()
    newest = weights_work_dir.candidates(work_dir)[0]
    assert newest.name.startswith('iter_')
    newest.write_bytes(spoil(newest.read_bytes()))
    run = Run(site, '--train', '--resume', work_dir=work_dir)
    assert run.end() == 0, run.text[-2000:]
    assert 'Damaged' in run.text and newest.name in run.text
    assert re.search('Resuming .*epoch_2.pth', run.text)
    assert_same_run(work_dir, uninterrupted)


def test_nothing_whole_to_resume(site):
    work_dir = site / 'empty'
    work_dir.mkdir()
    for name in ('epoch_1.pth', 'iter_3.pth'):
        (work_dir / name).write_bytes(b'half')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    with inside(site):
        outcome = drive('train_pretrained', 'tiny.py', '--resume', '--gpus', '1', '--work-dir', str(work_dir))
    assert (outcome.code, outcome.error) == (2, 'resume-nothing')
    assert 'epoch_1.pth' in outcome.err and 'iter_3.pth' in outcome.err


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts something on a new folder, or mounts it another way."""
    mounted: list[Path] = []

    def mount(*args: str) -> Path:
        target = tmp_path / 'mnt'
        target.mkdir(exist_ok=True)
        done = subprocess.run(['mount', *args, str(target)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f'cannot mount here: {done.stderr.strip()}')
        mounted.append(target)
        return target

    if os.geteuid():
        pytest.skip('only root can mount')
    yield mount
    for target in mounted:
        # Lazily, since a worker of a run that ended in an error may be about to leave.
        subprocess.run(['umount', '-l', str(target)], check=True)


@pytest.mark.slow
def test_disk_that_is_too_small_is_told_before_the_first_step(site, mount):
    work_dir = mount('-t', 'tmpfs', '-o', 'size=30m', 'tmpfs') / 'run'
    run = Run(site, '--train', work_dir=work_dir)
    assert run.end() == 2, run.text[-2000:]
    assert run.error == 'checkpoint-no-room-for-run' and 'Traceback' not in run.text
    assert run.step() == 0 and names(work_dir) == []


@pytest.mark.slow
def test_disk_that_fills_up(site, uninterrupted, mount):
    work_dir = mount('-t', 'tmpfs', '-o', 'size=90m', 'tmpfs') / 'run'
    run = Run(site, '--train', work_dir=work_dir)
    run.wait_for(lambda: run.step() >= STEPS + 2)
    filler = work_dir.with_name('filler')
    with filler.open('wb') as file, contextlib.suppress(OSError):  # until no room is left
        while True:
            file.write(bytes(2**16))
            file.flush()
    assert run.end() == 2, run.text[-2000:]
    assert run.error in ('run-cannot-write', 'checkpoint-no-room', 'checkpoint-not-saved', 'file-not-writable')
    assert 'epoch_1.pth' in whole_files(work_dir)
    filler.unlink()
    run = Run(site, '--train', '--resume', work_dir=work_dir)
    assert run.end() == 0, run.text[-2000:]
    assert_same_checkpoint(uninterrupted / LAST, work_dir / LAST)


def test_full_disk_leaves_the_old_file(mount):
    folder = mount('-t', 'tmpfs', '-o', 'size=1m', 'tmpfs')
    backend = checkpoints.AtomicBackend()
    backend.put(b'1' * 2**19, folder / 'a.pth')
    with refused('checkpoint-no-room'):
        backend.put(b'2' * 2**20, folder / 'a.pth')
    # As if another process took the room after the look at it.
    with nearly_full(2**30), pytest.raises(UserError, match='No space left on device'):
        backend.put(b'2' * 2**20, folder / 'a.pth')
    assert (folder / 'a.pth').read_bytes() == b'1' * 2**19
    assert [path.name for path in folder.iterdir()] == ['a.pth']


@pytest.mark.slow
def test_disk_that_becomes_read_only(site, mount):
    folder = mount('-t', 'tmpfs', '-o', 'size=90m', 'tmpfs')
    work_dir = folder / 'run'
    run = Run(site, '--train', work_dir=work_dir)
    run.wait_for(lambda: run.step() >= STEPS + 2)
    # The plain way is refused while files are open for writing.
    mount('--bind', '-o', 'bind', str(folder))
    subprocess.run(['mount', '-o', 'remount,ro,bind', str(folder)], check=True)
    before = whole_files(work_dir)
    for resume in (False, True):
        if resume:
            run = Run(site, '--train', '--resume', work_dir=work_dir)
        assert run.end() == 2, run.text[-2000:]
        assert re.search(r'error\[.*Read-only file system', run.text), run.text[-2000:]
        assert whole_files(work_dir) == before


@pytest.mark.slow
def test_estimate_of_the_room_is_that_of_the_files(uninterrupted):
    loaded = read.read_checkpoint(uninterrupted / LAST)
    momentum = [t for of in loaded['optimizer']['state'].values() for t in of.values()]
    tensors = sum(t.numel() * t.element_size() for t in (*loaded['state_dict'].values(), *momentum))
    size = (uninterrupted / LAST).stat().st_size
    print(f'tensors take {tensors:,} of {size:,} bytes')
    assert 0.95 < tensors / size < 1


@pytest.fixture
def break_images(site) -> Iterator[Callable[[int], list[str]]]:
    """Truncates some of the training images for the time of a test; gives their names."""
    devkit = site / 'data/demo/VOCdevkit/VOC2012'
    stems = (devkit / 'ImageSets/Segmentation/train.txt').read_text().split()
    good: dict[Path, bytes] = {}

    def truncate(count: int) -> list[str]:
        for stem in stems[:count]:
            path = devkit / f'JPEGImages/{stem}.jpg'
            good[path] = path.read_bytes()
            path.write_bytes(good[path][:100])
        return stems[:count]

    yield truncate
    for path, data in good.items():
        path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize('count', (2, 3))
def test_images_that_break_while_the_run_goes_on(site, tmp_path, break_images, count):
    run = Run(site, '--train', '--cfg-options', 'train_cfg.max_faulty_images=2', work_dir=tmp_path / 'run')
    run.wait_for(lambda: run.step() >= STEPS)
    broken = break_images(count)
    code = run.end()
    if count == 2:
        assert code == 0, run.text[-2000:]
        assert '2 training images cannot be read and are replaced by others' in run.text
        assert len((tmp_path / 'run/faulty_images_rank0.jsonl').read_text().splitlines()) == 2
    else:
        assert code == 2, run.text[-2000:]
        assert run.error == 'train-faulty-images'
        assert all(f'{stem}.jpg' in run.text for stem in broken)
        assert 'Traceback' not in run.text and whole_files(tmp_path / 'run')


def _private_mb(pid: int) -> float:
    """Memory that a process shares with no other."""
    text = Path(f'/proc/{pid}/smaps_rollup').read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith('Private_')) / 1024


@pytest.mark.slow
def test_memory_of_workers_stays_flat(site, tmp_path):
    work_dir = tmp_path / 'run'
    run = Run(
        site, '--train', '--cfg-options', 'train_cfg.max_epochs=16', 'train_cfg.val_interval=100', work_dir=work_dir
    )
    used = []
    for epoch in range(1, 15):
        run.wait_for(lambda epoch=epoch: run.step() >= epoch * STEPS + 5)
        used.append([_private_mb(pid) for pid in run.workers()])
    run.signal(signal.SIGTERM)
    assert run.end() == 143
    print('MiB of each worker, epochs 2 to 15:', [[round(mb, 1) for mb in row] for row in used])
    for worker in zip(*used[2:], strict=True):
        assert max(worker) < worker[0] + 5


MARK = 'MMFINETUNE_TEST_MARK'


def is_rank(pid: int) -> bool:
    """Whether a process, or the one that it was forked from, is one of several."""
    return b'\0RANK=' in Path(f'/proc/{pid}/environ').read_bytes()


def parent_of(pid: int) -> int:
    return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize('start', ('alone', 'launcher', 'torchrun'))
@pytest.mark.parametrize('killed', ('first', 'rank', 'loader'))
def test_no_process_is_left_when_one_is_killed(site, tmp_path, start, killed):
    mark, log = f'{MARK}={tmp_path}', tmp_path / 'log'
    tool = [str(TOOLS / 'train_pretrained.py'), 'tiny.py', '--train', '--verbose', '--work-dir', str(tmp_path / 'run')]
    command = {
        'alone': [sys.executable, *tool, '--gpus', '1'],
        'launcher': [sys.executable, *tool, '--gpus', '2'],
        'torchrun': [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', *tool],
    }[start]
    environment = {**os.environ, MARK: str(tmp_path), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    with log.open('w') as out:
        first = subprocess.Popen(command, cwd=site, env=environment, stdout=out, stderr=out)
    try:
        wait_for(lambda: re.search(r'Epoch\(train\)\s+\[1\]\[\s*2/', log.read_text()) or first.poll(), PATIENCE)
        assert first.poll() is None, log.read_text()[-2000:]
        ranks = (
            [first.pid]
            if start == 'alone'
            else [pid for pid in marked(mark) if is_rank(pid) and not is_rank(parent_of(pid))]
        )
        loaders = [pid for pid in marked(mark) if parent_of(pid) in ranks]
        assert len(ranks) == (1 if start == 'alone' else 2) and len(loaders) >= 2 * len(ranks)
        victim = {'first': first.pid, 'rank': max(ranks), 'loader': min(loaders)}[killed]
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        wait_for(lambda: first.poll() is not None and not marked(mark), 60)
        took = time.monotonic() - begin
        print(f'{start}, {killed} killed: 0 processes after {took:.1f} s')
        assert took < (5 if killed == 'first' else 15)
        whole_files(tmp_path / 'run')
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_twenty_double_starts(site, tmp_path):
    rng, work_dir, outcomes = random.Random(0), tmp_path / 'run', collections.Counter()
    short = ['--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.results=None', 'default_hooks.tensorboard=None']
    for number in range(20):
        if number % 4 == 0:
            shutil.rmtree(work_dir, ignore_errors=True)
        kept = {path.name: path.read_bytes() for path in work_dir.rglob('epoch_1.pth')}
        runs = []
        for _ in range(2):
            options = rng.choice((['--train'], ['--train', '--resume', 'auto'])) + short
            runs.append(Run(site, *options, work_dir=work_dir))
            runs[-1].log = tmp_path / f'{number}_{len(runs)}'
            time.sleep(rng.choice((0, 0, 0.5, 3)))
        codes = sorted(run.end() for run in runs)
        outcomes[tuple(codes)] += 1
        assert codes in ([0, 2], [0, 0]), [run.process.exitcode for run in runs]
        assert 'epoch_1.pth' in whole_files(work_dir) and not (work_dir / 'run.lock').exists()
        # What an earlier run has left is set aside or goes on, but is not lost.
        now = [path.read_bytes() for path in work_dir.rglob('epoch_1.pth')]
        assert all(data in now for data in kept.values())
    print('exit codes of 20 double starts:', dict(outcomes))
    assert outcomes[0, 2] >= 15
