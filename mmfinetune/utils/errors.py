"""The exception types that tools show as one message, and the messages themselves."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Message:
    """What is wrong, as a code and facts to compare and a wording to read.

    Two messages are equal if code and facts are; the wording may change.

    Args:
        code: Names the kind of message, e.g. ``'checkpoint-missing'``.
        text: The wording, with ``{name}`` for each fact that it shows.
        **facts: What it is about: a path, a key, ids.
    """

    def __init__(self, code: str, text: str, /, **facts: Any) -> None:
        self.code = code
        self.text = text
        self.facts = facts

    def __str__(self) -> str:
        return self.text.format(**self.facts) if self.facts else self.text

    def __repr__(self) -> str:
        return f'{self.code}({", ".join(f"{k}={v!r}" for k, v in self.facts.items())})'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and (self.code, self.facts) == (other.code, other.facts)

    def __hash__(self) -> int:
        return hash((self.code, str(self)))

    def at(self, place: object) -> Message:
        """The same message with the place (fact `place`) in front, for a finder that does not know it."""
        if 'place' in self.facts:
            return Message(self.code, self.text, **{**self.facts, 'place': f'{place}: {self.facts["place"]}'})
        return Message(self.code, f'{{place}}: {self.text}', place=str(place), **self.facts)


class Problem(ValueError):
    """What is wrong with a file or a value, raised where nobody knows yet what it means for the user.

    Args:
        code, text, **facts: See `Message`.
    """

    def __init__(self, code: str, text: str, /, **facts: Any) -> None:
        self.message = Message(code, text, **facts)
        super().__init__(str(self.message))

    def at(self, place: object) -> Problem:
        """The same problem with the place in front, see `Message.at`."""
        return _rebuilt_problem(self.message.at(place))

    def __reduce__(self) -> tuple:
        return _rebuilt_problem, (self.message,)


def _rebuilt_problem(message: Message) -> Problem:
    return Problem(message.code, message.text, **message.facts)


# How PyTorch passes on an error of a process that loads data: the text of its traceback.
_OF_WORKER = re.compile(r'Caught \w+ in DataLoader worker .*UserError: \[([a-z0-9-]+)\] (.*)', re.DOTALL)


class UserError(Exception):
    """A problem that the user can fix; shown as one message, exit code 2, no traceback.

    Args:
        code: See `Message`.
        text: What is wrong and where (file, key, line or id).
        problems: All problems of that kind, one line each.
        hint: How to fix it; may show the facts too.
        **facts: See `Message`.
    """

    max_shown = 50

    def __init__(
        self, code: str, text: Any = '', /, problems: Iterable[Any] = (), hint: str = '', cure: str = '', **facts: Any
    ) -> None:
        if not text and (of_worker := _OF_WORKER.match(code)):
            code, text = of_worker[1], of_worker[2].strip()
        if ' ' in code:  # UserError(text, problems, cure): removed once no call is left
            code, text, problems, hint = 'uncoded', code, list(text), problems if isinstance(problems, str) else cure
            self.message: Message = Message(code, text)
        else:
            self.message = Message(code, text, **facts)
        self.problems = list(problems)
        self.hint = hint.format(**facts) if facts else hint
        lines = [str(self.message)]
        lines += [f'  - {p}' for p in self.problems[: self.max_shown]]
        if len(self.problems) > self.max_shown:
            lines.append(f'  … and {len(self.problems) - self.max_shown} more')
        if self.hint:
            lines.append(f'Hint: {self.hint}')
        super().__init__('\n'.join(lines))

    @property
    def code(self) -> str:
        """Names the kind of error."""
        return self.message.code

    @property
    def facts(self) -> dict[str, Any]:
        """What it is about."""
        return self.message.facts

    def __str__(self) -> str:
        text = super().__str__()
        data = sys.modules.get('torch.utils.data')
        # The traceback is all that the main process gets, so the code has to be in it.
        return f'[{self.code}] {text}' if data is not None and data.get_worker_info() is not None else text

    def __reduce__(self) -> tuple:
        # Exceptions are pickled with `args`, which hold the whole text alone.
        return _rebuilt, (type(self), self.message, self.problems, self.hint)


def _rebuilt(kind: type[UserError], message: Message, problems: list, hint: str) -> UserError:
    error = kind(message.code, message.text, problems, **message.facts)
    error.hint = hint
    if hint:
        error.args = (f'{error}\nHint: {hint}',)
    return error


class Stopped(Exception):
    """A run that was asked to stop, and has.

    Args:
        number: The signal that asked.
        checkpoint: What was saved last; None if nothing was.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        self.number = number
        self.checkpoint = checkpoint
        where = (
            f'saved in {checkpoint}; continue with --resume'
            if checkpoint
            else 'before the first checkpoint: nothing is saved'
        )
        super().__init__(f'Stopped by {signal.Signals(number).name}, {where}')
