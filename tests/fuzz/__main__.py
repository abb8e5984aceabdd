"""Fuzz all readers of foreign files: each input is read or refused in words, in bounded time and memory.

Not allowed: another exception than UserError, more than the limits, a process, a connection, a file outside the target
folder, text that cannot be printed. Inputs follow from the seed, the target and a number: --only weights:17 repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ('weights', 'coco', 'yaml', 'labels', 'configs', 'runs')
SECONDS = 20  # of processor time, for one use of an input
HARD_SECONDS = 300  # by the clock, where no signal ends it or it waits
MEMORY = 4 << 30  # bytes more than after the start
MOST_TEXT = 200_000  # characters of a message
ROOT = Path(__file__).parents[2]
# What the audit hook sees, and the arguments that name what is written.
WRITES = {
    'os.mkdir': [0],
    'os.rmdir': [0],
    'os.remove': [0],
    'os.truncate': [0],
    'os.chmod': [0],
    'os.rename': [0, 1],
    'os.link': [1],
    'os.symlink': [1],
}
STARTS = (
    'subprocess.Popen',
    'os.system',
    'os.exec',
    'os.posix_spawn',
    'os.spawn',
    'os.startfile',
    'pty.spawn',
    'socket.connect',
    'socket.getaddrinfo',
)


class TooLong(BaseException):
    """An input took more than its time."""


class Forbidden(BaseException):
    """An input made the toolkit do what no file may make it do."""


class Watch:
    """Sees every file that is written and every process and connection that is started."""

    def __init__(self, written: list[Path], linked: list[Path]) -> None:
        self.written, self.linked = (
            tuple(f'{os.path.realpath(p)}{os.sep}' for p in some) for some in (written, linked)
        )
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in STARTS:
            raise Forbidden(f'{event} {args!r:.200}')
        places: list[Any] = []
        if event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            places = [args[0]]
        elif event in WRITES:
            places = [args[k] for k in WRITES[event]]
        # A function of the shutil module works in folders that it has opened before.
        base = args[-1] if event.startswith('os.') and isinstance(args[-1], int) and args[-1] > 2 else None
        for place in places:
            if isinstance(place, (str, bytes, os.PathLike)) and not self._is_in(place, self.written, base):
                raise Forbidden(f'{event} {place!r:.200}')
        if event == 'os.link' and not self._is_in(args[0], self.written + self.linked):
            raise Forbidden(f'{event} from {args[0]!r:.200}')

    def _is_in(self, place: Any, folders: tuple[str, ...], base: int | None = None) -> bool:
        path = Path(os.fsdecode(place))
        if base is not None:
            folder = Path(f'/proc/self/fd/{base}').readlink()
            if path.name == str(path) != '..':
                # What the kernel says is real already, and to follow a deep folder link by link takes its square.
                return f'{folder}{os.sep}{path}{os.sep}'.startswith(folders)
            path = folder / path
        return str(path) == os.devnull or f'{os.path.realpath(path.parent)}{os.sep}{path.name}{os.sep}'.startswith(
            folders
        )


class Worker:
    """Runs inputs in this process, and notes in a file what it is at."""

    def __init__(self, folder: Path, seed: int, names: list[str]) -> None:
        self.folder, self.seed, self.findings = folder, seed, folder / 'findings.jsonl'
        sys.dont_write_bytecode = True
        site = folder / 'site'
        shutil.rmtree(site, ignore_errors=True)
        for name in ('cwd', 'tmp', 'cache'):
            (site / name).mkdir(parents=True)
        os.environ.update(
            XDG_CACHE_HOME=str(site / 'cache'), MPLCONFIGDIR=str(site / 'cache'), TMPDIR=str(site / 'tmp')
        )
        tempfile.tempdir = None
        os.chdir(site / 'cwd')
        import matplotlib.font_manager  # noqa: F401  starts a process to find the fonts, once

        from tests.fuzz.targets import TARGETS

        self.targets, self.outs = {}, {}
        for name in names:
            (site / name / 'out').mkdir(parents=True)
            self.targets[name] = TARGETS[name](site / name)
            self.outs[name] = site / name / 'out'
        self.watch = Watch([*self.outs.values(), site / 'cache', site / 'tmp'], [site / name / 'in' for name in names])
        self.used = _resident()
        size = int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        signal.signal(signal.SIGPROF, self._too_long)

    def _too_long(self, *_: object) -> None:
        raise TooLong(f'more than {SECONDS} s')

    def run(self, name: str, number: int) -> Counter[str]:
        """One input; the outcomes of its uses."""
        rng = random.Random(f'{self.seed}:{name}:{number}')
        self._empty(self.outs[name])
        outcomes: Counter[str] = Counter()
        uses = self.targets[name].make(rng)
        while True:
            try:
                use = next(uses, None)
            except Exception as error:
                outcomes['not written'] += 1
                outcomes[f'not written: {type(error).__name__}'] += 1
                return outcomes
            if use is None:
                return outcomes
            kind, text = self._use(use)
            if kind == 'refused':
                outcomes[f'code {text}'] += 1
            outcomes[kind if kind in ('read', 'refused') else 'finding'] += 1
            if kind not in ('read', 'refused'):
                self._note(name, number, kind, text)
            if (now := _resident()) > self.used + (1 << 30):
                outcomes['finding'] += 1
                self._note(name, number, 'memory', f'{(now - self.used) / 1e9:.1f} GB')
                self.used = now

    def _use(self, use: Callable[[], object]) -> tuple[str, str]:
        """What came of it, and the text of that."""
        from mmfinetune.utils.errors import UserError

        try:
            with self._limited() as said:
                try:
                    use()
                except UserError as error:
                    said.write(f'{error}'.encode(errors='backslashreplace').decode())
                    return ('refused', error.code) if len(f'{error}') <= MOST_TEXT else ('long message', error.code)
                finally:
                    said.flush()
        except (TooLong, Forbidden, Exception) as error:
            return type(error).__name__, ''.join(traceback.format_exception(error, limit=-12))[-4000:]
        return 'read', ''

    @contextlib.contextmanager
    def _limited(self) -> Iterator[io.TextIOWrapper]:
        said = io.TextIOWrapper(io.BytesIO(), 'utf-8')
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(HARD_SECONDS, exit=True)
        self.watch.on = True
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                yield said
        finally:
            self.watch.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()

    def _empty(self, folder: Path) -> None:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _note(self, name: str, number: int, kind: str, text: str) -> None:
        with self.findings.open('a') as file:
            file.write(json.dumps({'input': f'{name}:{number}', 'kind': kind, 'text': text}) + '\n')


def _resident() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _child(folder: Path, options: argparse.Namespace, state: dict[str, Any]) -> None:
    """Run inputs until the time is up; the state file says after each where to go on."""
    worker = Worker(folder, options.seed, options.targets)
    before = state['seconds']
    start = time.process_time()
    if options.only:
        name, _, number = options.only.partition(':')
        print(dict(worker.run(name, int(number))))
        return
    while True:
        spent = state['spent']
        name = min(
            options.targets, key=lambda n: spent.get(n, 0) if options.inputs is None else state['next'].get(n, 0)
        )
        number = state['next'].get(name, 0)
        if options.inputs is not None and number >= options.inputs:
            return
        state['next'][name], state['at'] = number + 1, f'{name}:{number}'
        _save(folder, state)  # before the input: one that ends the process is not tried again
        begin = time.process_time()
        outcomes = worker.run(name, number)
        spent[name] = spent.get(name, 0) + time.process_time() - begin
        counts = Counter(state['outcomes'].get(name, {})) + outcomes
        state['outcomes'][name] = dict(counts)
        state['seconds'] = before + time.process_time() - start
        if options.inputs is None and state['seconds'] > options.seconds:
            state['at'] = None
            _save(folder, state)
            return


def _save(folder: Path, state: dict[str, Any]) -> None:
    part = folder / 'state.part'
    part.write_text(json.dumps(state))
    part.replace(folder / 'state.json')


def _summary(folder: Path, state: dict[str, Any]) -> int:
    findings = [json.loads(line) for line in (folder / 'findings.jsonl').read_text().splitlines()]
    print(f'{"target":<9} {"inputs":>8} {"seconds":>8} {"read":>8} {"refused":>8} {"unwritten":>9}')
    for name, outcomes in state['outcomes'].items():
        counts = [outcomes.get(key, 0) for key in ('read', 'refused', 'not written')]
        print(
            f'{name:<9} {state["next"][name]:>8} {state["spent"][name]:>8.0f} {counts[0]:>8} {counts[1]:>8} {counts[2]:>9}'
        )
    for name, outcomes in state['outcomes'].items():
        codes = Counter(
            {key.removeprefix('code '): count for key, count in outcomes.items() if key.startswith('code ')}
        )
        print(f'{name}: {len(codes)} codes: {", ".join(f"{code} {count}" for code, count in codes.most_common(12))}')
    kinds: dict[tuple[str, str], list[dict]] = {}
    for finding in findings:
        ours = [line.strip() for line in finding['text'].splitlines() if 'mmfinetune/' in line]
        kinds.setdefault((finding['kind'], ours[-1] if ours else finding['text'][-200:]), []).append(finding)
    for (kind, place), same in kinds.items():
        print(
            f'\n{kind}, {len(same)} times, {place}: {", ".join(f["input"] for f in same[:5])}\n{same[0]["text"][-1500:]}'
        )
    print(
        f'\n{sum(state["next"].values())} inputs, {state["seconds"]:.0f} s of processor time, {len(kinds)} kinds of findings; {folder}'
    )
    return 1 if findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.fuzz', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--seconds', type=float, default=60, help='processor time, shared by the targets (default: %(default)s)'
    )
    parser.add_argument('--inputs', type=int, help='inputs of each target, instead of a time')
    parser.add_argument('--targets', nargs='+', choices=NAMES, default=list(NAMES))
    parser.add_argument('--seed', default='0', help='another seed, other inputs')
    parser.add_argument('--only', metavar='TARGET:NUMBER', help='one input')
    parser.add_argument(
        '--folder', type=Path, help='where all happens; one of an earlier call is continued (default: a new one)'
    )
    options = parser.parse_args()
    if options.only:
        options.targets = [options.only.partition(':')[0]]
    folder = (options.folder or Path(tempfile.mkdtemp(prefix='fuzz-'))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'findings.jsonl').touch()
    state: dict[str, Any] = {'next': {}, 'spent': {}, 'outcomes': {}, 'seconds': 0.0, 'at': None}
    while True:
        if (folder / 'state.json').is_file() and not options.only:
            state = json.loads((folder / 'state.json').read_text())
        child = os.fork()
        if child == 0:
            faulthandler.enable()
            code = 1
            try:
                _child(folder, options, state)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        state = json.loads((folder / 'state.json').read_text()) if (folder / 'state.json').is_file() else state
        if status == 0 or options.only:
            break
        if state['at'] is None:
            return 2  # not an input, but this program
        with (folder / 'findings.jsonl').open('a') as file:
            file.write(json.dumps({'input': state['at'], 'kind': f'process ended, status {status}', 'text': ''}) + '\n')
    return _summary(folder, state)


if __name__ == '__main__':
    sys.exit(main())
