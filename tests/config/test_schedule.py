"""What the schedulers of a run do is known, and said, before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import mmfinetune.engine.optim  # noqa: F401
from mmfinetune.config import schedule
from mmfinetune.engine.runner import FineTuningRunner
from tests.builders.errors import codes, refused
from tests.builders.runs import forget_runs
from tests.builders.toy import make_cfg

LR = 0.02
LAYERED = {
    'constructor': 'LayeredOptimWrapperConstructor',
    'optimizer': {'type': 'SGD', 'lr': LR, 'momentum': 0.9},
    'paramwise_cfg': {'custom_keys': {'layers.0': {'lr_mult': 0.1}, 'layers.3': {}}},
}
ALIKE = {**LAYERED, 'paramwise_cfg': {'custom_keys': {'layers.0': {}, 'layers.3': {}}}}
PLATEAU = {'type': 'ReduceOnPlateauLR', 'monitor': 'score', 'rule': 'greater', 'patience': 0}


def build(folder: Path, schedulers: Sequence[dict], wrapper: dict = LAYERED) -> FineTuningRunner:
    """4 epochs of 5 steps."""
    forget_runs()
    cfg = make_cfg(folder)
    cfg.optim_wrapper, cfg.param_scheduler = wrapper, list(schedulers)
    runner = FineTuningRunner.from_cfg(cfg)
    runner.build()
    return runner


@pytest.mark.parametrize(
    'scheduler',
    [
        {'type': 'OneCycleLR', 'eta_max': LR, 'total_steps': 20, 'by_epoch': False},
        {'type': 'CosineAnnealingLR', 'T_max': 4, 'eta_min': 1e-4},
        {'type': 'PolyLR', 'eta_min': 1e-3, 'end': 4},
        {**PLATEAU, 'min_value': 1e-3},
        {'type': 'CosineRestartLR', 'periods': [2, 2], 'restart_weights': [1, 1], 'eta_min': 1e-3},
    ],
)
def test_a_schedule_that_changes_the_ratios_of_the_groups_is_refused(tmp_path, scheduler):
    with refused('schedule-ratios') as caught:
        schedule.course_of(build(tmp_path, [scheduler]))
    assert caught.value.problems[0].facts['types'] == scheduler['type']
    # Groups of one rate have nothing to lose.
    schedule.course_of(build(tmp_path, [scheduler], ALIKE))


@pytest.mark.parametrize(
    'scheduler',
    [
        {'type': 'LinearLR', 'start_factor': 0.1, 'end': 3},
        {'type': 'MultiStepLR', 'milestones': [2]},
        {'type': 'CosineAnnealingLR', 'T_max': 20, 'eta_min_ratio': 0.1, 'by_epoch': False},
        {'type': 'CosineAnnealingLR', 'T_max': 4, 'convert_to_iter_based': True},
        {'type': 'PolyLR', 'end': 4},
        {'type': 'ExponentialLR', 'gamma': 0.9},
        {'type': 'CosineAnnealingMomentum', 'T_max': 4, 'eta_min': 0.5},
        {'type': 'ReduceOnPlateauMomentum', 'monitor': 'score', 'patience': 0},
        PLATEAU,
    ],
)
def test_what_multiplies_is_accepted_and_changes_nothing_by_being_tried(tmp_path, scheduler):
    runner = build(tmp_path, [scheduler])
    groups = [{k: v for k, v in g.items() if k != 'params'} for g in runner.optim_wrapper.param_groups]
    states = [dict(s.state_dict()) for s in runner.param_schedulers]
    schedule.course_of(runner)
    assert groups == [{k: v for k, v in g.items() if k != 'params'} for g in runner.optim_wrapper.param_groups]
    assert states == [s.state_dict() for s in runner.param_schedulers]


def test_the_course_is_what_the_run_does(tmp_path):
    schedulers = [
        {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 4},
        {'type': 'MultiStepLR', 'milestones': [2, 3], 'gamma': 0.5},
    ]
    runner = build(tmp_path, schedulers)
    course = schedule.course_of(runner)
    assert (course.samples, course.steps, course.epochs, course.total) == (10, 5, 4, 20)
    runner.train()
    seen = runner.message_hub.get_scalar('train/lr').data[0]
    base = runner.group_settings[0]['lr']
    assert seen.tolist() == pytest.approx([factor * base for factor in course.factors])


def test_more_steps_than_a_scheduler_can_do(tmp_path):
    runner = build(tmp_path, [{'type': 'OneCycleLR', 'eta_max': LR, 'total_steps': 9, 'by_epoch': False}], ALIKE)
    with refused('config-cannot-build'):
        schedule.course_of(runner)


@pytest.mark.parametrize(
    ('schedulers', 'expected'),
    [
        ([{'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 10}], []),
        (
            [{'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 500}],
            ['schedule-beyond-run', 'schedule-too-low'],
        ),
        ([{'type': 'MultiStepLR', 'milestones': [2, 4]}], ['schedule-beyond-run']),
        ([{'type': 'MultiStepLR', 'milestones': [2], 'end': 12}], ['schedule-beyond-run']),
        ([{'type': 'StepLR', 'step_size': 9}], ['schedule-beyond-run']),
        ([{'type': 'CosineAnnealingLR', 'T_max': 40}], ['schedule-beyond-run']),
        ([{'type': 'LinearLR', 'begin': 7, 'end': 9}], ['schedule-beyond-run']),
        ([{'type': 'LinearLR', 'start_factor': 1.0, 'end_factor': 0.0, 'end': 2}], ['schedule-idle']),
        ([{'type': 'ConstantLR', 'factor': 0.5, 'end': 2}], []),
        ([], []),
    ],
)
def test_what_lies_beyond_the_run_is_a_warning(tmp_path, schedulers, expected):
    runner = build(tmp_path, schedulers)
    assert codes(schedule.course_of(runner).warnings(runner.cfg, LR)) == expected


@pytest.mark.parametrize(('begin', 'expected'), [(4, []), (5, ['schedule-no-validation'])])
def test_a_run_that_ends_before_its_first_validation(tmp_path, begin, expected):
    runner = build(tmp_path, [])
    runner.cfg.train_cfg.val_begin = begin
    assert codes(schedule.course_of(runner).warnings(runner.cfg, LR)) == expected


def test_without_the_hook_nothing_is_stepped(tmp_path):
    forget_runs()
    cfg = make_cfg(tmp_path)
    cfg.param_scheduler = [{'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 4}]
    cfg.default_hooks = dict(cfg.default_hooks, param_scheduler=None)
    runner = FineTuningRunner.from_cfg(cfg)
    runner.build()
    assert schedule.course_of(runner).factors == pytest.approx([0.1] * 20)


@pytest.mark.parametrize('new', [False, True])
def test_a_run_that_is_resumed_with_another_schedule(tmp_path, new):
    first = build(tmp_path, [{'type': 'MultiStepLR', 'milestones': [2], 'gamma': 0.1}])
    first.train()
    forget_runs()
    cfg = first.cfg.copy()
    cfg.param_scheduler = [{'type': 'ExponentialLR', 'gamma': 0.5}]
    cfg.train_cfg.max_epochs, cfg.resume, cfg.load_from = 6, True, str(tmp_path / 'epoch_4.pth')
    runner = FineTuningRunner.from_cfg(cfg)
    runner.new_schedule = new
    runner.build()
    course = schedule.course_of(runner)
    runner.train()
    base = runner.group_settings[0]['lr']
    assert runner.iter == course.total == 30
    # Without --new-schedule the plan puts the checkpoint's settings into the config: the states do not fit others.
    if new:
        seen = runner.message_hub.get_scalar('train/lr').data[0][-10:]
        assert seen.tolist() == pytest.approx([factor * base for factor in course.factors[-10:]])
