"""The exception types that tools show as one message."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A problem the user can mend; shown as one message, exit code 2, no traceback.

    Args:
        message: What is wrong and where (file, key, line or id).
        problems: All problems of that kind, one line each.
        cure: What to do about it.
    """

    max_shown = 50

    def __init__(self, message: str, problems: Iterable[str] = (), cure: str = '') -> None:
        self.message = message
        self.problems = list(problems)
        self.cure = cure
        lines = [message]
        lines += [f'  - {p}' for p in self.problems[:self.max_shown]]
        if len(self.problems) > self.max_shown:
            lines.append(f'  … and {len(self.problems) - self.max_shown} more')
        if cure:
            lines.append(f'How to mend it: {cure}')
        super().__init__('\n'.join(lines))


class Stopped(Exception):
    """A run that was asked to stop, and has.

    Args:
        number: The signal that asked.
        checkpoint: What was saved last; None if nothing was.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        self.number = number
        self.checkpoint = checkpoint
        where = f'saved in {checkpoint}; go on with --resume' if checkpoint \
            else 'before the first checkpoint: nothing is saved'
        super().__init__(f'Stopped by {signal.Signals(number).name}, {where}')
