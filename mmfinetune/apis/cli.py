"""What the tools share: parser, flags, error handling. Nothing here imports torch."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from mmfinetune.engine import launch
from mmfinetune.utils.errors import Stopped, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with examples, one command a line."""
    lines = '\n'.join(f'  {line.strip()}' for line in examples.strip().splitlines())
    return argparse.ArgumentParser(
        description=description, epilog=f'examples:\n{lines}', formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``CONFIG`` and ``--cfg-options``."""
    parser.add_argument(
        'config',
        nargs='?' if default else None,
        default=default,
        help='config file' + (' (default: %(default)s)' if default else ''),
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_cfg.max_epochs=12; an unknown key is an error',
    )


def _own_message(error: UserError) -> str:
    """The message alone: a DataLoader worker wraps it into its own traceback."""
    text = str(error)
    mark = 'mmfinetune.utils.errors.UserError: '
    if text.startswith('Caught UserError') and mark in text:
        text = text.rsplit(mark, 1)[1].strip()
    return text


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's ``main`` and exit.

    The code is 0 or what ``main`` returns, 2 on a UserError, 130 on Ctrl-C, and 128 + the signal
    where a run was asked to stop. Of several processes one shows the error.
    """
    launch.follow_launcher()
    try:
        code = main() or 0
        launch.leave_group()
        sys.stdout.flush()
    except UserError as error:
        text = f'error[{error.code}]: {_own_message(error)}'
        if not launch.report(text, error):
            print(text, file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except Stopped as stop:
        if os.environ.get('RANK', '0') == '0':
            print(stop, file=sys.stderr, flush=True)
        code = 128 + stop.number
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # `tool | head`: the reader has left, and flushing stdout at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not launch.report(traceback.format_exc(), error):
            raise
        code = 1
    sys.exit(code)
