"""Early stopping, also over a resume."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub

from mmfinetune.engine.hooks.early_stop import EarlyStopHook
from mmfinetune.engine.state import run_state, update_run_state


def early_stop(hook: EarlyStopHook, scores: list[float], state: dict | None = None):
    hub = MessageHub(f'early_{id(hook)}')
    runner = SimpleNamespace(
        message_hub=hub, train_loop=SimpleNamespace(stop_training=False), logger=logging.getLogger('early')
    )
    update_run_state(runner, early_stop=state or {})
    hook.before_train(runner)
    count = 0
    for score in scores:
        if runner.train_loop.stop_training:
            break
        hook.after_val_epoch(runner, {'coco/segm_mAP': score})
        count += 1
    return count, run_state(runner).early_stop


def test_a_tenth_of_a_point_counts_and_less_does_not():
    growing = [0.5 + 0.0011 * i for i in range(30)]
    assert early_stop(EarlyStopHook(patience=3), growing)[0] == 30
    # Each of them is less than a tenth of a point above the first.
    assert early_stop(EarlyStopHook(patience=3), [0.5, 0.5004, 0.5008, 0.5009, 0.6])[0] == 4


@pytest.mark.parametrize('resumed_after', range(1, 7))
def test_a_resumed_run_stops_where_the_other_one_does(resumed_after):
    scores = [0.1, 0.3, 0.2, 0.3, 0.31, 0.2, 0.1, 0.3, 0.9, 0.9]
    assert early_stop(EarlyStopHook(patience=3), scores)[0] == 8
    _, state = early_stop(EarlyStopHook(patience=3), scores[:resumed_after])
    # As it comes out of a checkpoint that is read as data.
    state = json.loads(json.dumps(state))
    count, _ = early_stop(EarlyStopHook(patience=3), scores[resumed_after:], state)
    assert resumed_after + count == 8


def test_a_stopped_run_stays_stopped_unless_more_patience_is_asked_for():
    scores = [0.5] + [0.4] * 3
    _, state = early_stop(EarlyStopHook(patience=3), scores)
    assert early_stop(EarlyStopHook(patience=3), [0.9], state)[0] == 0
    assert early_stop(EarlyStopHook(patience=5), [0.9], state)[0] == 1


def test_a_threshold_that_was_reached_stays_reached():
    hook = dict(patience=9, stopping_threshold=0.8)
    count, state = early_stop(EarlyStopHook(**hook), [0.5, 0.85, 0.9])
    assert count == 2 and early_stop(EarlyStopHook(**hook), [0.9], state)[0] == 0
