"""The forecast of a training: its arithmetic, and the tool that makes it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.runner.utils import calc_dynamic_intervals

from mmfinetune.apis import probe
from mmfinetune.apis.forecast import Length, Measured, forecast, validations_of
from mmfinetune.engine.train_loop import ExactTrainLoop
from mmfinetune.engine.transforms import LoadImage
from tests.builders.runs import files_in, train_tool

GIB = 2**30
ONE_STEP = ('train_dataloader.batch_size=8', 'train_cfg.max_epochs=1')
MEASURED = Measured(
    startup=5,
    first=2,
    step=0.5,
    loader=0.2,
    epoch_start=1,
    epoch_end=3,
    image=0.1,
    evaluate=1,
    evaluate_image=0.01,
    validation_end=4,
    memory=2 * GIB,
    on_gpu=True,
    checkpoint=GIB,
    best=GIB // 2,
    other=0,
)
LENGTH = Length(steps=100, epochs=4, validations=2, val_images=50, test_images=20, workers=2, checkpoints=3, best=1)


def test_a_run_takes_the_sum_of_its_parts():
    found = forecast(MEASURED, LENGTH, free=10 * GIB)
    assert found.validation == pytest.approx(50 * 0.1 + 1 + 50 * 0.01 + 4)
    assert found.parts == pytest.approx(
        {'start': 7, 'steps': 200, 'loader': 3 * 1, 'validation': 2 * 10.5, 'saving': 4 * 3}
    )
    assert found.total == pytest.approx(7 + 200 + 3 + 21 + 12)
    assert found.test == pytest.approx(20 * 0.11 + 1)
    assert (found.disk, found.memory) == (3.5 * GIB, 2 * GIB)
    text = '\n'.join(found.lines())
    assert '0:04:03 in all' in text and '2 validations of 10.5 s' in text and 'warning' not in text


def test_processes_load_beside_the_steps():
    slow = dataclasses.replace(MEASURED, loader=0.8)
    assert forecast(MEASURED, LENGTH, GIB).step == 0.5
    assert forecast(slow, LENGTH, GIB).step == 0.8
    assert forecast(slow, dataclasses.replace(LENGTH, workers=0), GIB).step == pytest.approx(1.3)


@pytest.mark.parametrize(
    ('changes', 'limits'), [({}, 'step'), ({'loader': 0.8}, 'loader'), ({'image': 4.0}, 'validation')]
)
def test_what_limits_is_said_with_its_cure(changes, limits):
    found = forecast(dataclasses.replace(MEASURED, **changes), LENGTH, 10 * GIB)
    cure = {'step': '--amp', 'loader': 'num_workers=2', 'validation': 'val_interval'}[limits]
    assert found.limits == limits
    assert any(line.startswith('Limit:') and cure in line for line in found.lines())


def test_too_little_disk_is_a_warning():
    assert 'max_keep_ckpts' in list(forecast(MEASURED, LENGTH, free=3 * GIB).lines())[-1]


@pytest.mark.parametrize(
    ('length', 'begin', 'interval', 'dynamic', 'count'),
    [
        (3, 1, 1, (), 3),
        (7, 1, 3, (), 3),  # 3, 6 and the end
        (10, 5, 2, (), 3),  # 6, 8, 10
        (10, 1, 5, [(8, 1)], 5),  # 5, 7 (MMEngine looks one epoch ahead), 8, 9, 10
        (4, 9, 1, (), 0),
    ],
)
def test_validations_are_counted_as_the_loop_makes_them(length, begin, interval, dynamic, count):
    assert validations_of(length, begin, interval, dynamic) == count
    loop = ExactTrainLoop.__new__(ExactTrainLoop)
    loop._runner = SimpleNamespace(val_loop=object())
    loop.max_epochs, loop.val_begin = length, begin
    loop._milestones, loop._intervals = calc_dynamic_intervals(interval, list(dynamic) or None)
    due = 0
    for loop._epoch in range(1, length + 1):
        due += loop._is_validation_due()
    assert due == count


def test_probe_needs_dry_run():
    outcome = train_tool('tiny.py', '--probe')
    assert (outcome.code, outcome.error) == (2, 'probe-without-dry-run')


def test_the_probe_trains_elsewhere_and_leaves_nothing(in_site, monkeypatch):
    before = files_in(in_site)
    monkeypatch.setattr(probe, 'room', lambda path: 10**6)
    outcome = train_tool('tiny.py', '--dry-run', '--probe', '--work-dir', 'work_dirs/probed')
    assert outcome.code == 0, outcome.err
    assert files_in(in_site) == before
    assert 'max_keep_ckpts' in outcome.out
    for head in ('Time: ', 'Memory: ', 'Disk: ', 'Limit: '):
        assert f'\n{head}' in outcome.out
    assert ', 2 validations of ' in outcome.out


def test_a_slow_loader_limits(in_site, monkeypatch):
    load = LoadImage.transform

    def slow(self, results):
        time.sleep(0.4)
        return load(self, results)

    monkeypatch.setattr(LoadImage, 'transform', slow)
    # One step, and no validation, which this would slow down as well.
    args = ('--cfg-options', 'val_dataloader=None', 'val_cfg=None', 'val_evaluator=None', *ONE_STEP)
    outcome = train_tool('tiny.py', '--dry-run', '--probe', '--json', '--work-dir', 'work_dirs/probed', *args)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found['limits'], found['validations']) == ('loader', 0)
    assert found['step'] > 8 * 0.4  # images of a batch, one after another
    assert found['disk'] > 0 and not Path('work_dirs/probed').exists()
