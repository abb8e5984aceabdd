"""What comes with a result: pictures, tables, curves. None of it ends a run, a test or a tool that succeeded."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator

from mmfinetune.utils.console import SHOWN
from mmfinetune.utils.errors import Message, UserError

# Set by the tests: what cannot be made is an error.
STRICT = 'MMFINETUNE_STRICT_RESULTS'


def warn(message: Message) -> None:
    """Log a warning; outside of a run print it."""
    engine = sys.modules.get('mmengine.logging')
    if engine is None:
        print(f'warning: {message}', file=sys.stderr, flush=True)
    else:
        engine.print_log(str(message), logger='current', level=logging.WARNING)


def note(text: str) -> None:
    """Log what a run does that is not usual, and show it."""
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().info(text, extra=SHOWN)


@contextlib.contextmanager
def extra(what: object) -> Iterator[None]:
    """Warn where an extra of a result cannot be made or written, and continue after the block."""
    try:
        yield
    except Exception as error:
        if os.environ.get(STRICT):
            raise
        why = error if isinstance(error, (UserError, OSError)) else traceback.format_exc()
        warn(Message('results-not-written', what=what, why=why))
