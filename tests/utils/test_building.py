"""What passes while a library builds."""

from __future__ import annotations

import signal

import pytest

from mmfinetune.utils.building import building
from mmfinetune.utils.errors import Stopped, UserError
from tests.builders.errors import refused


@pytest.mark.parametrize('error', [UserError('mine', 'mine'), Stopped(signal.SIGINT, None), KeyboardInterrupt()])
def test_what_no_setting_does_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, building('the first training step'):
        raise error
    assert caught.value is error


def test_what_a_library_raises_names_the_part():
    with refused('config-cannot-build') as caught, building('model.neck'):
        raise KeyError('no such layer. Please check whether it is registered')
    facts = caught.value.problems[0].facts
    assert (facts['part'], facts['kind'], facts['why']) == ('model.neck', 'KeyError', 'no such layer.')
