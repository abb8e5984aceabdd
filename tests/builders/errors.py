"""Expect a UserError by its code and facts; the wording is held by ``tests/messages.txt`` alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from mmfinetune.utils.errors import Message, Problem, UserError


@contextlib.contextmanager
def refused(code: str, **facts: Any) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with this code, and these facts among its own."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, f'{caught.value.code}: {caught.value}'
    assert {k: caught.value.facts.get(k) for k in facts} == facts


@contextlib.contextmanager
def faulty(code: str, **facts: Any) -> Iterator[pytest.ExceptionInfo[Problem]]:
    """Expect a Problem with this code, and these facts among its own."""
    with pytest.raises(Problem) as caught:
        yield caught
    message = caught.value.message
    assert message.code == code, repr(message)
    assert {k: message.facts.get(k) for k in facts} == facts


def codes(messages) -> list[str]:
    """The codes of problems, notes or the like, in their order."""
    return [message.code for message in messages]


def message(code: str, **facts: Any) -> Message:
    """A message to compare with: its wording does not count."""
    return Message(code, '', **facts)
