"""What the tools share: their options, exit codes and error handling. Nothing here imports torch.

An option that more than one tool has is a row of `SHARED`: one name, one meaning, one wording.
"""

from __future__ import annotations

import argparse
import contextlib
import locale
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmfinetune.engine import launch
from mmfinetune.evaluation.stats import SCORE_THR
from mmfinetune.utils import console
from mmfinetune.utils.errors import Stopped, UserError, stopped_by
from mmfinetune.utils.processes import Readers, interruptible
from mmfinetune.utils.text import brief

# Pictures go to files, whatever a desktop or a notebook's kernel asks of its children.
os.environ['MPLBACKEND'] = 'Agg'

EXIT_USER_ERROR = 2
EXIT_CRASH = os.EX_SOFTWARE
# Of all tools; in each --help and in docs/tools.md.
EXIT_CODES = {
    '0': 'done',
    '1': 'done, and the answer is no: errors in the data, configs that differ, inputs that failed',
    '2': 'something for you to fix; the message says what',
    '70': 'a crash, with a traceback: please report it',
    '129': 'stopped since the terminal was closed (SIGHUP); training saves its state first',
    '130, 143': 'stopped by Ctrl-C or SIGTERM; training saves its state first',
}


def integer(lowest: int, highest: int = (1 << 31) - 1, name: str | None = None) -> Callable[[str], int]:
    """What reads an option's value as an integer within bounds; the highest is that of a C int by default."""
    name = name or f'an integer from {lowest:,} to {highest:,}'

    def read(text: str) -> int:
        # Python does not read thousands of digits, and takes 1_0 and blanks.
        with contextlib.suppress(ValueError):
            if text.removeprefix('-').isdecimal() and lowest <= int(text) <= highest:
                return int(text)
        raise argparse.ArgumentTypeError(f'{brief(text)} is not {name}')

    return read


positive_int = integer(1, name='a positive integer')


def positive_int_or_auto(text: str) -> int | str:
    """A positive integer, or ``auto``."""
    return text if text == 'auto' else positive_int(text)


def share(text: str) -> float:
    """An option's value as a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to 1')


class names(argparse.Action):
    """One or more words. One word with commas, the form of earlier releases, is split."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs='+', **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) == 1 and ',' in values[0]:
            values = [name.strip() for name in values[0].split(',')]
            if not all(values):
                parser.error(f'argument {option_string}: an empty name')
            note(f'{option_string} takes words now: {option_string} {" ".join(map(repr, values))}')
        setattr(namespace, self.dest, values)


class _Verbose(argparse.Action):
    """Concerns the process as a whole, and is not a setting of a tool."""

    def __call__(self, *_: Any) -> None:
        console.verbose = True


# Everything that two or more tools have; `add` puts them into a parser.
SHARED: dict[str, dict[str, Any]] = {
    '--config': dict(type=Path, metavar='CONFIG', help='config file'),
    '--cfg-options': dict(
        nargs='+',
        default=(),
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_cfg.max_epochs=12; an unknown key is an error',
    ),
    '--run': dict(type=Path, metavar='WORK_DIR', help='work dir of a run: its config and best checkpoint are used'),
    '--checkpoint': dict(type=Path, metavar='FILE', help='trained checkpoint'),
    '--data-root': dict(
        type=Path,
        metavar='DIR',
        help='folder of the data: one that holds VOCdevkit/VOC2012, that folder itself, or one with the annotation '
        'files that the config names',
    ),
    '--image-root': dict(type=Path, metavar='DIR', help='folder that the image names are relative to'),
    '--classes': dict(action=names, metavar='NAME', help='classes to keep'),
    '--split': dict(choices=('test', 'val', 'train'), default='test', help='split of the data (default: %(default)s)'),
    '--batch-size': dict(type=positive_int, metavar='N', help='images per step on one device'),
    '--epochs': dict(type=positive_int, metavar='N', help='length of the training'),
    '--score-thr': dict(
        type=share, default=SCORE_THR, metavar='SCORE', help='lowest score of a detection (default: %(default)s)'
    ),
    '--workers': dict(type=positive_int, metavar='N', help='processes (default: all cores); the result is the same'),
    '--skip-bad': dict(action='store_true', help='leave out images with problems, and list them, instead of stopping'),
    '--trust-masks': dict(
        action='store_true', help='keep images in which only the classes or the XML disagree with the masks'
    ),
    '--out': dict(type=Path, help='where to write'),
    '--overwrite': dict(action='store_true', help='replace what an earlier call of this tool has written there'),
    '--json': dict(action='store_true', help='print the result as JSON'),
    '--no-pictures': dict(dest='pictures', action='store_false', help='write no pictures'),
    '--dry-run': dict(action='store_true', help='check and report only'),
    '--verbose': dict(
        action=_Verbose, nargs=0, dest=argparse.SUPPRESS, help='show all messages of the libraries too, no status line'
    ),
}


def add(parser: Any, *options: str, more: str = '', **changes: Any) -> None:
    """Add options of `SHARED`.

    Args:
        parser: A parser or a group of one.
        *options: Their names.
        more: What only this tool says of them; follows the common help.
        **changes: Differences from the common settings, e.g. a default; not the help.
    """
    for option in options:
        settings = {**SHARED[option], **changes}
        if more:
            settings['help'] += f'{"" if more.startswith((" ", ";", ",")) else " "}{more}'
        parser.add_argument(option, **settings)


def note(text: str) -> None:
    """Tell of something that works, but not for long."""
    print(f'note: {text}', file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A parser that still takes the option names of the last release, with a note."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.old_options: dict[str, str] = {}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._renamed(arg) for arg in given], namespace)

    def _renamed(self, arg: str) -> str:
        name, equals, value = arg.partition('=')
        new = self.old_options.get(name)
        if new is None:
            return arg
        note(f'{name} is now called {new}; the old name will be removed in the next release')
        return f'{new}{equals}{value}'


def old_option(parser: Parser, old: str, new: str) -> None:
    """Accept an option under the name that it had in the last release too."""
    parser.old_options[old] = new


def make_parser(description: str, examples: str) -> Parser:
    """Make a parser whose help ends with examples, one command a line, and the exit codes."""
    lines = '\n'.join(f'  {line.strip()}' for line in examples.strip().splitlines())
    codes = '\n'.join(f'  {code:<9} {meaning}' for code, meaning in EXIT_CODES.items())
    parser = Parser(
        description=description,
        epilog=f'examples:\n{lines}\n\nexit codes:\n{codes}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add(parser, '--verbose')
    return parser


def _insist_on_utf8() -> None:
    """Let files be UTF-8 whatever the locale, and let nothing printed be an error.

    MMDetection, pycocotools and TensorBoard open files in the encoding of the locale, and only a new process can be
    in Python's UTF-8 mode. In a program that merely calls a tool nothing is started.
    """
    is_tool = sys.orig_argv[-len(sys.argv) :] == sys.argv
    if is_tool and locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8'):
        os.environ['PYTHONUTF8'] = '1'  # of processes started from here
        os.environ.setdefault('PYTHONIOENCODING', str(sys.stdout.encoding))  # the terminal stays what it is
        os.execv(sys.executable, [sys.executable, '-X', 'utf8', *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # of a notebook or a test
            stream.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's ``main`` and exit with one of `EXIT_CODES`; ``main`` returns 0 or 1.

    Of several processes of a run one shows the error.
    """
    _insist_on_utf8()
    launch.follow_launcher()
    with console.calm():
        code = _exit_code(main)
    sys.exit(code)


def _exit_code(main: Callable[[], int | None]) -> int:
    try:
        with interruptible():
            code = _call(main)
            launch.leave_group()
        sys.stdout.flush()
    except UserError as error:
        text = f'error[{error.code}]: {error}'
        if not launch.report(text, error):
            print(text, file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except Stopped as stop:
        code = _stopped(stop.number, str(stop), stop)
    except KeyboardInterrupt as stop:
        number = int(stop.args[0]) if stop.args else signal.SIGINT
        code = _stopped(number, stopped_by(number), stop)
    except BrokenPipeError:
        # `tool | head`: the reader has left, and flushing stdout at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not launch.report(traceback.format_exc(), error):
            traceback.print_exc()
        code = EXIT_CRASH
    return code


def _stopped(number: int, text: str, stop: BaseException) -> int:
    """Say, once for all processes, that they were stopped; the exit code."""
    if not launch.report(text, stop) and os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError):  # the terminal is closed
            print(text, file=sys.stderr, flush=True)
    return 128 + number


def _call(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except BaseException:
        console.keep_status()
        # Before they are waited for: one may hang.
        Readers.kill_all()
        raise
