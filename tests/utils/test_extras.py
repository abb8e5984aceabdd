"""What comes with a result never costs it; here in the tests it does."""

from __future__ import annotations

import sys

import pytest

from mmfinetune.utils import extras
from mmfinetune.utils.errors import Message, UserError
from tests.builders.errors import message


@pytest.mark.parametrize('error', [OSError(28, 'No space left'), UserError('uncoded'), StopIteration(), 1 / 3])
def test_a_failure_is_said_and_what_follows_runs(monkeypatch, error):
    monkeypatch.delenv(extras.STRICT)
    said: list[Message] = []
    monkeypatch.setattr(extras, 'warn', said.append)
    with extras.extra('a.png'):
        raise error if isinstance(error, Exception) else TypeError(error)
    (found,) = said
    assert found.code == 'results-not-written' and found.facts['what'] == 'a.png'
    # A traceback only where the user has nothing to fix.
    assert ('Traceback' in str(found)) != isinstance(error, (OSError, UserError))


def test_tests_are_strict_and_a_stop_is_a_stop(monkeypatch):
    with pytest.raises(StopIteration), extras.extra('a.png'):
        raise StopIteration
    monkeypatch.delenv(extras.STRICT)
    with pytest.raises(KeyboardInterrupt), extras.extra('a.png'):
        raise KeyboardInterrupt


def test_outside_of_a_run_it_goes_to_stderr(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, 'mmengine.logging', raising=False)
    extras.warn(message('gone'))
    assert capsys.readouterr() == ('', 'warning: \n')
