"""What the tools show: a status line that is overwritten, and little of what libraries say; all of it with ``--verbose``.

The status line is for terminals. In a pipe, a file and with ``TERM=dumb`` there is none, and no colour. It is plain text
with two control codes: a live display of rich hides the cursor, and a process that is killed leaves it hidden.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

WIDTH = 100
# A log record with this attribute is shown though it is no warning.
SHOWN = {'shown': True}
_QUIET_S = 1.0  # so long nothing may happen before the status line says why
_CLEAR = '\r\x1b[2K'
_COLOURS = {'error': 31, 'warning': 33}
_HEAD = re.compile(r'(error|warning)(\[[a-z0-9-]+\])?(?=: )')
# pycocotools prints these for each file that it reads, MMEngine the last.
_CHATTER = re.compile(
    r'(loading annotations into memory|creating index|Loading and preparing results|Running per image evaluation'
    r'|Accumulating evaluation results)\.\.\.|index created!|D(one|ONE) \(t=[\d.]+s\)\.?'
    r'|Loads checkpoint by \S+ backend from path: .*'
)
_DEPRECATED = re.compile(
    r'deprecat|(upcoming|future) (release|version)|will be (removed|required|changed)', re.IGNORECASE
)
_DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ('stdlib', 'purelib', 'platlib')})

verbose = False  # --verbose sets it


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that can overwrite a line."""
    try:
        return stream.isatty() and os.environ.get('TERM') not in ('dumb', 'unknown')
    except (AttributeError, ValueError):  # of a notebook, or closed
        return False


def _columns() -> int:
    """The width of what is overwritten: a line that fills the terminal to its last column is two on some."""
    return min(WIDTH, shutil.get_terminal_size().columns - 1)


def bar(items: Iterable[Any] | None = None, wanted: bool = True, **settings: Any) -> tqdm:
    """A progress bar of tqdm, gone when the work is done; none without a terminal, or if it is not wanted."""
    from tqdm import tqdm

    hidden = not (wanted and is_terminal(sys.stderr))
    return tqdm(items, disable=hidden, leave=False, ncols=_columns(), **settings)


def wrapped(text: str, indent: str = '  ') -> str:
    """Text in lines of at most `WIDTH` columns; a longer word, a path say, stays whole."""
    rules: dict[str, Any] = dict(break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    lines = (textwrap.wrap(line, WIDTH, **rules) if len(line) > WIDTH else [line] for line in text.split('\n'))
    return '\n'.join(itertools.chain(*lines))


def fit(parts: Sequence[str], gap: str = '  ', width: int = WIDTH) -> str:
    """The parts on one line, without empty ones and those for which there is no room."""
    line = parts[0]
    for part in filter(None, parts[1:]):
        if len(line + gap + part) <= width:
            line += gap + part
    return line


class _Screen:
    """The outputs of this process, and the line at the bottom of the terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._lock = out, threading.RLock()
        is_first = os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0'
        self.has_status = is_terminal(out) and is_first
        self._is_shown = False
        self._at_start = True
        self._is_quiet = True  # nothing was shown so far
        self._swallow = False
        self._held: list[str] = []
        self.hide: Callable[[str], object] = self._held.append

    def write(self, stream: TextIO, text: str) -> int:
        if not verbose and stream is self._out and self._is_chatter(text):
            return len(text)
        with self._lock:
            self.clear()
            self._is_quiet = self._is_quiet and not text
            if self._at_start and is_terminal(stream) and not os.environ.get('NO_COLOR'):
                text = _HEAD.sub(_painted, text, count=1) if _HEAD.match(text) else text
            if text:
                # tqdm ends a bar that goes with a carriage return.
                self._at_start = text[-1] in '\r\n'
            return stream.write(text)

    def _is_chatter(self, text: str) -> bool:
        if self._swallow and text == '\n':
            self._swallow = False
            return True
        line = text.removesuffix('\n')
        if not _CHATTER.fullmatch(line):
            return False
        self._swallow = line == text
        self.hide(line)
        return True

    def show(self, text: str) -> None:
        if not self.has_status or verbose:
            return
        with self._lock, contextlib.suppress(OSError):  # the terminal is closed
            start = _CLEAR if self._is_shown or self._at_start else '\n'
            # Before it is written: a signal may come in between.
            self._is_shown, self._at_start, self._is_quiet = True, True, False
            self._out.write(start + text[: _columns()])
            self._out.flush()

    def clear(self, keep: bool = False) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._is_shown:
                self._is_shown = False
                self._out.write('\n' if keep else _CLEAR)
                self._out.flush()

    def leave(self) -> None:
        """Show no more status lines from this process."""
        self._lock, self.has_status, self._is_shown = threading.RLock(), False, False

    def show_what_takes_so_long(self) -> None:
        if self._is_quiet:
            self.show('Loading PyTorch…' if 'torch' in sys.modules else 'Loading…')

    def warn(
        self, before: Callable, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any
    ) -> None:
        """Python's ``warnings.showwarning``, without what libraries say of the future of other libraries."""
        of_future = issubclass(category, _DEPRECATIONS) or _DEPRECATED.search(str(message))
        if of_future and filename.startswith(_LIBRARIES) and not verbose:
            self.hide(f'{filename}:{lineno}: {category.__name__}: {message}')
        else:
            before(message, category, filename, lineno, *rest)

    def adopt(self, logger: logging.Logger) -> None:
        """Let a logger's stream show warnings alone, and its file hold all that is not shown."""
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and not verbose:
                handler.addFilter(_is_shown)
                handler.setFormatter(_Plain())
        self.hide = logger.info
        while self._held:
            logger.info(self._held.pop(0))


def _is_shown(record: logging.LogRecord) -> bool:
    if record.levelno < logging.WARNING:
        return getattr(record, 'shown', False)
    return record.levelno > logging.WARNING or not _DEPRECATED.search(record.getMessage())


def _painted(head: re.Match) -> str:
    return f'\x1b[{_COLOURS[head[1]]}m{head[0]}\x1b[0m'


class _Plain(logging.Formatter):
    """The text, and before a warning or an error that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        head = f'{record.levelname.lower()}: ' if record.levelno >= logging.WARNING else ''
        return wrapped(head + super().format(record))


class _Stream:
    """An output that makes room for what is printed."""

    def __init__(self, screen: _Screen, stream: TextIO) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> int:
        return self._screen.write(self._stream, text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_screen: _Screen | None = None


def _in_child() -> None:
    """A thread that held the lock when the process forked is not there to release it, and the line is not the child's."""
    if _screen is not None:
        _screen.leave()


os.register_at_fork(after_in_child=_in_child)


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Show a status line, and hide what libraries say; for a tool, from its start to its end."""
    global _screen, verbose
    before = sys.stdout, sys.stderr, warnings.showwarning, _screen
    verbose = False
    screen = _screen = _Screen(sys.stdout)
    sys.stdout, sys.stderr = _Stream(screen, sys.stdout), _Stream(screen, sys.stderr)  # type: ignore[assignment]
    warnings.showwarning = lambda *args: screen.warn(before[2], *args)
    timer = threading.Timer(_QUIET_S, screen.show_what_takes_so_long)
    timer.daemon = True
    if screen.has_status:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        screen.clear()
        sys.stdout, sys.stderr, warnings.showwarning, _screen = before


def has_status() -> bool:
    """Whether there is a status line."""
    return _screen is not None and _screen.has_status and not verbose


def status(*parts: str) -> None:
    """Show what is going on, over what was shown before, as far as there is room; nothing without a terminal."""
    if _screen is not None:
        _screen.show(fit(parts, ' ', _columns()))


def keep_status() -> None:
    """Leave the status line as it is and start a new line, before an error is shown."""
    if _screen is not None:
        _screen.clear(keep=True)


def adopt(logger: logging.Logger) -> None:
    """Let the logger of a run show what is for people, and its file hold the rest."""
    if _screen is not None:
        _screen.adopt(logger)


def near(path: str | Path) -> str:
    """A path as one would type it here."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)
