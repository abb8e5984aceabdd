"""What is said of a training that has not learned, by what is known of it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from mmfinetune.evaluation import diagnosis
from tests.builders.errors import codes

COMMANDS = dict.fromkeys(('check', 'plan', 'weights', 'pictures', 'slower', 'errors'), 'python tools/x.py')
# 2000 steps of a run that learns.
GOOD = diagnosis.Facts(
    losses=[2 - i / 2000 for i in range(2000)],
    rates=[0.01, *[0.02] * 1999],
    lr=0.02,
    ap={'bbox': 0.5, 'segm': 0.4},
    reinit=8,
    absent=(),
    classes=4,
    objects=900,
)
FLAT, ZERO = [2.0] * 2000, {'bbox': 0.0, 'segm': 0.0}


@pytest.mark.parametrize(
    ('changes', 'signs', 'first'),
    [
        ({}, [], []),
        # A loss that was low from the start, or a short run, that found a lot anyway.
        ({'losses': FLAT}, [], []),
        ({'losses': [2.0] * 5, 'rates': [0.001] * 5}, [], []),
        ({'ap': ZERO}, ['unlearned-ap'], ['cause-data', 'cause-lr-low', 'cause-scores']),
        ({'ap': {}, 'losses': FLAT}, ['unlearned-loss'], ['cause-data']),
        ({'ap': {'bbox': -1.0}}, ['unlearned-ap'], ['cause-no-truth']),
        ({'ap': {'bbox': 0.5, 'segm': 0.0}}, ['unlearned-masks'], ['cause-masks']),
        (
            {'ap': ZERO, 'losses': [2.0] * 50, 'rates': [i / 1000 * 0.02 for i in range(50)]},
            ['unlearned-warm-up', 'unlearned-ap', 'unlearned-loss'],
            ['cause-warm-up', 'cause-few-steps', 'cause-data'],
        ),
        ({'losses': [math.nan] * 500 + FLAT[:1500]}, ['unlearned-skipped'], ['cause-lr-high']),
        ({'losses': [math.nan, *FLAT], 'ap': {'bbox': 0.2}}, [], []),
        (
            {'ap': ZERO, 'losses': [2 + i / 999 for i in range(2000)]},
            ['unlearned-ap', 'unlearned-loss'],
            ['cause-lr-high'],
        ),
        ({'ap': ZERO, 'absent': ('a', 'b', 'c')}, ['unlearned-ap'], ['cause-absent']),
        ({'ap': ZERO, 'objects': 0, 'absent': tuple('abcd')}, ['unlearned-ap'], ['cause-no-objects', 'cause-absent']),
        ({'ap': ZERO, 'reinit': None}, ['unlearned-ap'], ['cause-no-weights']),
        ({'losses': [], 'rates': [], 'ap': {}}, [], []),
    ],
)
def test_signs_and_causes(changes, signs, first):
    facts = dataclasses.replace(GOOD, **changes)
    found = diagnosis.signs(facts)
    assert codes(found) == signs
    if not signs:
        return
    causes = diagnosis.causes(facts, COMMANDS)
    assert len(causes) == 3 and codes(causes)[: len(first)] == first
    assert all('python tools/x.py' in str(cause) for cause in causes) and all(map(str, found))
