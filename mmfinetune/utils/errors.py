"""The exception types that tools show as one message, and the messages, whose wording is in ``messages.yaml``."""

from __future__ import annotations

import functools
import re
import signal
import string
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


@functools.cache
def wordings() -> dict[str, dict[str, str]]:
    """Text and, where there is one, hint of each message by its code."""
    import yaml

    content = Path(__file__).with_name('messages.yaml').read_text(encoding='utf-8')
    return yaml.load(content, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))


class _Wording(string.Formatter):
    """Cuts what a foreign file can make as long as it likes; a path of the longest length fits."""

    most_of_value, most_of_text = 300, 5_000  # characters of a fact as Python writes it, and of another

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        text = super().convert_field(value, conversion)
        most = self.most_of_value if conversion == 'r' else self.most_of_text
        return f'{text[: most - 1]}…' if isinstance(text, str) and len(text) > most else text


_WORDING = _Wording()


class Message:
    """What is wrong, as a code and facts to compare and a wording to read.

    Two messages are equal if code and facts are; the wording may change.

    Args:
        code: Names the kind of message.
        text: The wording, with ``{name}`` for each fact that it shows; that of ``messages.yaml`` by default.
        **facts: What it is about: a path, a key, ids.
    """

    def __init__(self, code: str, text: str | None = None, /, **facts: Any) -> None:
        self.code, self.own_text, self.facts = code, text, facts

    @property
    def text(self) -> str:
        """The wording before the facts are put in."""
        return wordings()[self.code]['text'] if self.own_text is None else self.own_text

    def __str__(self) -> str:
        return _WORDING.vformat(self.text, (), self.facts) if self.facts else self.text

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
    """What is wrong with a file or a value, raised where nobody knows yet what it means for the user; see `Message`."""

    def __init__(self, code: str, text: str | None = None, /, **facts: Any) -> None:
        self.message = Message(code, text, **facts)
        super().__init__(str(self.message))

    def at(self, place: object) -> Problem:
        """The same problem with the place in front, see `Message.at`."""
        message = self.message.at(place)
        return Problem(message.code, message.own_text, **message.facts)

    def __reduce__(self) -> tuple:
        return ValueError.__new__, (type(self), *self.args), self.__dict__


# How PyTorch passes on an error of a process that loads data: the text of its traceback.
_OF_WORKER = re.compile(r'Caught \w+ in DataLoader worker .*UserError: \[([a-z0-9-]+)\] (.*)', re.DOTALL)


class UserError(Exception):
    """A problem that the user can fix; shown as one message, exit code 2, no traceback.

    Args:
        code, text, **facts: See `Message`.
        problems: All problems of that kind, one line each.
        hint: How to fix it, as the facts decide; that of ``messages.yaml`` by default.
    """

    max_shown = 50

    def __init__(
        self, code: str, text: str | None = None, /, problems: Iterable[Any] = (), hint: str | None = None, **facts: Any
    ) -> None:
        if text is None and code not in wordings():
            of_worker = _OF_WORKER.match(code)
            code, text = (of_worker[1], of_worker[2].strip()) if of_worker else ('uncoded', code)
        if hint is None:
            hint = wordings()[code].get('hint', '') if text is None else ''
        self.message = Message(code, text, **facts)
        self.code, self.facts, self.problems = code, facts, list(problems)
        self.hint = _WORDING.vformat(hint, (), facts) if facts else hint
        lines = [str(self.message)]
        lines += [f'  - {p}' for p in self.problems[: self.max_shown]]
        if len(self.problems) > self.max_shown:
            lines.append(f'  … and {len(self.problems) - self.max_shown} more')
        if self.hint:
            lines.append(f'Hint: {self.hint}')
        super().__init__('\n'.join(lines))

    def __str__(self) -> str:
        text = super().__str__()
        data = sys.modules.get('torch.utils.data')
        # The traceback is all that the main process gets, so the code has to be in it.
        return f'[{self.code}] {text}' if data is not None and data.get_worker_info() is not None else text

    def __reduce__(self) -> tuple:
        # By default exceptions are made again of `args`, which hold the whole text alone.
        return Exception.__new__, (type(self), *self.args), self.__dict__


def stopped_by(number: int) -> str:
    """What is said first of a stop by a signal."""
    return f'Stopped by {signal.Signals(number).name}'


class Stopped(Exception):
    """A run that was asked to stop, and has.

    Args:
        number: The signal that asked.
        checkpoint: What was saved last; None if nothing was.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        self.number, self.checkpoint = number, checkpoint
        where = 'before the first checkpoint: nothing is saved'
        if checkpoint:
            where = f'saved in {checkpoint}; continue with --resume'
        super().__init__(f'{stopped_by(number)}, {where}')
