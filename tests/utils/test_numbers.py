"""Which values of foreign files are numbers."""

from __future__ import annotations

import math

import pytest

from mmfinetune.utils.numbers import is_number


@pytest.mark.parametrize('value', [0, -1, 2.5, 10**300])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize('value', [True, None, '1', [1], math.nan, math.inf, 10**400])
def test_no_numbers(value):
    assert not is_number(value)
