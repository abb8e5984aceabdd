"""The one pool of worker processes."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time

import pytest

from mmfinetune.utils.workers import in_order
from tests.builders.errors import refused


class Square:
    """Work on something large: it must reach the workers without being pickled."""

    def __reduce__(self) -> tuple:
        raise AssertionError('pickled')

    def __call__(self, number: int) -> tuple[int, int]:
        time.sleep(0.02 * (number % 3 == 0))
        return number**2, os.getpid()


@pytest.mark.skipif(sys.platform != 'linux', reason='only forked processes share memory')
def test_results_come_in_order_from_several_processes():
    results = list(in_order(Square(), range(40), workers=3, chunk=2, wanted=False))
    assert [square for square, _ in results] == [number**2 for number in range(40)]
    assert os.getpid() not in {pid for _, pid in results}
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize('items, workers', [(range(5), 1), (range(2), 8), (range(0), 4)])
def test_little_work_needs_no_process(items, workers):
    results = list(in_order(Square(), items, workers, chunk=2, wanted=False))
    assert results == [(number**2, os.getpid()) for number in items]


def test_a_killed_worker_is_an_error():
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with refused('worker-killed'):
        list(in_order(die, range(8), workers=2, chunk=1, wanted=False))
