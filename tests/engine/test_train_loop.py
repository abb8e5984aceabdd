"""A run that is stopped anywhere and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfinetune.engine import train_loop
from mmfinetune.weights.read import read_checkpoint
from tests.builders.errors import refused
from tests.builders.toy import DoAt, assert_same_checkpoint, make_cfg, names, stop, train

LAST = 'epoch_4.pth'
# 5 steps an epoch, so that an accumulation of 2 goes over its end; 3 images are portraits, so that
# each epoch ends with a mixed batch.
ASPECT = dict(batch_sampler=dict(type='AspectRatioBatchSampler'))
CASES = {
    'plain': {},
    'workers': dict(workers=2),
    'accumulation': dict(accumulate=2),
    'aspect ratio': dict(train_dataloader=ASPECT),
    # 3 portraits and 5 landscapes: mmdet's sampler says 4 batches and gives 3.
    'aspect ratio, wrong length': dict(
        dataset=dict(type='ToyDataset', images=8),
        train_dataloader=dict(batch_sampler=dict(type='AspectRatioBatchSampler', drop_last=True)),
    ),
    'repeated': dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(type='ToyDataset', images=5))),
    'joined': dict(
        dataset=dict(
            type='ConcatDataset', datasets=[dict(type='ToyDataset', images=4), dict(type='ToyDataset', images=6)]
        )
    ),
    'balanced': dict(dataset=dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=dict(type='ToyDataset'))),
    'sparse saves': dict(checkpoint=dict(interval=2)),
    'AdamW': dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))),
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The uninterrupted run of a case."""

    @functools.cache
    def run(case: str) -> Path:
        folder = tmp_path_factory.mktemp('whole')
        train(make_cfg(folder, **CASES[case]))
        return folder

    return run


# After the first step, in the middle, after the last step of an epoch and after the very last.
@pytest.mark.parametrize(
    ('case', 'step'),
    [
        ('plain', 19),
        ('workers', 6),
        ('accumulation', 4),
        ('aspect ratio', 1),
        ('aspect ratio, wrong length', 2),
        ('repeated', 6),
        ('sparse saves', 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ('plain', 0),
                ('plain', 7),
                ('workers', 1),
                ('workers', 9),
                ('accumulation', 0),
                ('accumulation', 5),
                ('accumulation', 7),
                ('aspect ratio', 8),
                ('joined', 6),
                ('aspect ratio, wrong length', 4),
                ('balanced', 6),
                ('sparse saves', 7),
                ('AdamW', 3),
            )
        ),
    ],
)
def test_stop_and_resume_is_exact(whole, tmp_path, case, step):
    stop(make_cfg(tmp_path, **CASES[case]), step)
    train(make_cfg(tmp_path, **CASES[case]), resume=True)
    assert names(tmp_path) == names(whole(case))
    for name in names(tmp_path):
        assert_same_checkpoint(whole(case) / name, tmp_path / name)


def test_every_step_of_the_way(whole, tmp_path):
    for step in range(0, 20, 2):
        stop(make_cfg(tmp_path, **CASES['accumulation']), step, resume=step > 0)
    train(make_cfg(tmp_path, **CASES['accumulation']), resume=True)
    assert_same_checkpoint(whole('accumulation') / LAST, tmp_path / LAST)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    stops=st.lists(st.integers(0, 19), min_size=1, max_size=3, unique=True).map(sorted),
    case=st.sampled_from(['plain', 'accumulation', 'sparse saves', 'AdamW']),
)
def test_no_stops_change_anything(whole, tmp_path_factory, stops, case):
    folder = tmp_path_factory.mktemp('stopped')
    for i, step in enumerate(stops):
        stop(make_cfg(folder, **CASES[case]), step, resume=i > 0)
    train(make_cfg(folder, **CASES[case]), resume=True)
    assert_same_checkpoint(whole(case) / LAST, folder / LAST)


def test_number_of_workers_changes_nothing(whole):
    assert_same_checkpoint(whole('plain') / LAST, whole('workers') / LAST)


def test_run_resumed_with_other_workers_is_the_same(whole, tmp_path):
    stop(make_cfg(tmp_path, workers=2), 6)
    train(make_cfg(tmp_path), resume=True)
    assert_same_checkpoint(whole('plain') / LAST, tmp_path / LAST)


def test_another_seed_is_another_run(whole, tmp_path):
    train(make_cfg(tmp_path, randomness=dict(seed=4)))
    with pytest.raises(AssertionError, match='state_dict'):
        assert_same_checkpoint(whole('plain') / LAST, tmp_path / LAST)


@pytest.mark.parametrize(
    ('point', 'step'),
    [
        ('before_train_epoch', None),
        ('before_val', 10),
        ('after_val_epoch', 20),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (('before_train_iter', 3), ('after_val_iter', 20), ('after_val_epoch', 10))
        ),
    ],
)
def test_signal_at_other_moments(whole, tmp_path, capfd, point, step):
    stopped = stop(make_cfg(tmp_path), step, point, signal.SIGINT)
    assert str(stopped.checkpoint) == (tmp_path / 'last_checkpoint').read_text()
    assert 'the run is saved after this step' in capfd.readouterr().err
    train(make_cfg(tmp_path), resume=True)
    assert names(tmp_path) == names(whole('plain'))
    for name in names(tmp_path):
        assert_same_checkpoint(whole('plain') / name, tmp_path / name)


def test_validation_that_was_cut_off_is_made_up_for(whole, tmp_path, capsys):
    stop(make_cfg(tmp_path), 20, 'before_val')
    assert 'best_score_epoch_4.pth' not in names(tmp_path)
    train(make_cfg(tmp_path, log_level='INFO'), resume=True)
    assert 'Epoch 4 was trained but not validated: validating it now' in capsys.readouterr().out
    assert 'best_score_epoch_4.pth' in names(tmp_path)


def test_resume_of_a_finished_run_changes_nothing(tmp_path, capsys):
    train(make_cfg(tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    train(make_cfg(tmp_path, log_level='INFO'), resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert 'validating it now' not in capsys.readouterr().out


def test_epochs_are_validated_as_the_interval_says(tmp_path):
    changes = dict(train_cfg=dict(val_interval=3))
    train(make_cfg(tmp_path / 'whole', **changes))
    scores = read_checkpoint(tmp_path / 'whole' / LAST)['message_hub']['log_scalars']['val/score']
    assert list(scores.data[0]) == [0.2, 0.4]
    stop(make_cfg(tmp_path / 'cut', **changes), 9)
    train(make_cfg(tmp_path / 'cut', **changes), resume=True)
    assert_same_checkpoint(tmp_path / 'whole' / LAST, tmp_path / 'cut' / LAST)


def test_early_stopping_goes_on_counting(tmp_path):
    # 0.1, 0.3, 0.2, 0.4, 0.4, 0.1: the last two are no improvement.
    changes = dict(hooks=[dict(type='EarlyStopHook', monitor='score', patience=2)], train_cfg=dict(max_epochs=9))
    train(make_cfg(tmp_path / 'whole', **changes))
    stop(make_cfg(tmp_path / 'cut', **changes), 26)
    runner = train(make_cfg(tmp_path / 'cut', **changes), resume=True)
    assert runner.train_loop.stop_training and runner.epoch == 6
    assert_same_checkpoint(tmp_path / 'whole' / 'epoch_6.pth', tmp_path / 'cut' / 'epoch_6.pth')


def test_early_stop_stays_stopped(tmp_path):
    hooks = [dict(type='EarlyStopHook', monitor='score', patience=1)]
    assert train(make_cfg(tmp_path, hooks=hooks)).epoch == 3
    assert train(make_cfg(tmp_path, hooks=hooks), resume=True).epoch == 3


@pytest.mark.parametrize('workers', (0, 2))
def test_faulty_images_are_replaced_and_told(tmp_path, capsys, workers):
    changes = dict(dataset=dict(type='ToyDataset', bad=(3, 7)), workers=workers)
    train(make_cfg(tmp_path, **changes))
    assert '2 training images cannot be read' in capsys.readouterr().out
    assert len((tmp_path / 'faulty_images_rank0.jsonl').read_text().splitlines()) == 2


def test_too_many_faulty_images_end_the_run(tmp_path):
    with refused('train-faulty-images', count=3, allowed=2) as caught:
        train(make_cfg(tmp_path, dataset=dict(type='ToyDataset', bad=(3, 4, 7)), train_cfg=dict(max_faulty_images=2)))
    assert [problem.split()[0] for problem in caught.value.problems] == ['img3.jpg', 'img4.jpg', 'img7.jpg']


@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGINT))
def test_workers_outlive_a_signal_to_all_processes(whole, tmp_path, number):
    def workers(runner) -> list:
        return runner.train_dataloader._iterator._workers

    def signal_workers(runner) -> None:
        # From another process, as theirs may well end them.
        subprocess.run(['kill', f'-{number:d}', *(str(w.pid) for w in workers(runner))], check=True)

    def end_workers(runner) -> None:
        for worker in workers(runner):
            worker.terminate()
            worker.join(20)
        codes.extend(worker.exitcode for worker in workers(runner))

    codes: list[int] = []
    train(
        make_cfg(tmp_path, workers=2),
        DoAt(signal_workers, 1),
        DoAt(signal_workers, 7),
        DoAt(end_workers, point='after_train'),
    )
    assert_same_checkpoint(whole('plain') / LAST, tmp_path / LAST)
    assert codes == [0, 0]


@pytest.mark.parametrize('number', (errno.ENOSPC, errno.EROFS))
def test_full_disk_is_told_wherever_it_is_met(number):
    problem = OSError(number, os.strerror(number), 'events.out')
    with refused('run-cannot-write', reason=str(problem)), train_loop.translate_system_errors():
        raise problem


def test_other_errors_of_the_system_are_not_translated(tmp_path):
    def fail(runner) -> None:
        raise FileNotFoundError(errno.ENOENT, 'gone')

    with pytest.raises(FileNotFoundError):
        train(make_cfg(tmp_path), DoAt(fail, 6))
