"""The table of a run's epochs."""

from __future__ import annotations

import math

import pytest

from mmfinetune.evaluation.history import History, best_of


def row(epoch: int | None, iteration: int, **more: float) -> dict[str, float]:
    steps = {'iter': iteration} if epoch is None else {'epoch': epoch, 'iter': iteration}
    return {**steps, 'train/loss': 4.0 / iteration, 'lr': 0.002, **more}


@pytest.fixture
def history() -> History:
    first = {'val/loss': 1 / 3, 'coco/segm_mAP': 0.1}
    return History([row(1, 10, **first), row(2, 20, **{'coco/segm_mAP': 0.3})])


def test_columns_are_grouped_whatever_their_order_in_a_row():
    found = History(
        [
            {'val_seconds': 1.0, 'lr/neck': 0.1, 'coco/segm_mAP': 0.5, 'iter': 1, 'train/acc': 1.0},
            {'lr': 0.1, 'val/acc': 2.0, 'epoch': 2, 'iter': 2, 'train_seconds': 3.0, 'own': 1.0},
        ]
    ).columns()
    assert found == [
        'epoch',
        'iter',
        'train/acc',
        'val/acc',
        'coco/segm_mAP',
        'own',
        'lr/neck',
        'lr',
        'train_seconds',
        'val_seconds',
    ]


def test_csv_keeps_every_digit():
    rows = [
        {'epoch': 1, 'iter': 7, 'train/loss': 1 / 3, 'coco/segm_mAP': -1.0},
        {'epoch': 2, 'iter': 14, 'train/loss': math.nan, 'lr/head': 0.1 + 0.2},
    ]
    text = History(rows).to_csv()
    assert text == (
        'epoch,iter,train/loss,coco/segm_mAP,lr/head\n1,7,0.3333333333333333,-1.0,\n2,14,nan,,0.30000000000000004\n'
    )
    again = History.from_csv(text.encode())
    assert again.rows[0] == rows[0]
    assert again.rows[1].pop('train/loss') != 0
    assert again.rows[1] == {'epoch': 2, 'iter': 14, 'lr/head': 0.1 + 0.2}
    assert History.from_csv(History().to_csv().encode()).rows == []


def test_csv_saved_by_a_spreadsheet_is_read():
    found = History.from_csv('\ufeff"epoch","iter",train/loss\r\n1,10,0.5\r\n\r\n'.encode())
    assert found.rows == [{'epoch': 1, 'iter': 10, 'train/loss': 0.5}]


@pytest.mark.parametrize(
    'text, message',
    [
        (b'', 'not a table'),
        (b'\xff\xfe', 'not a table'),
        (b'epoch,iter\n1,"2\n', 'not a table'),
        (b'epoch;iter\n1;2\n', 'line 1'),
        (b'epoch,loss\n1,2\n', 'line 1'),
        (b'epoch,iter,a,a\n', 'line 1'),
        (b'epoch,iter,a\n1,2\n', 'line 2: 2 fields, not 3'),
        (b'epoch,iter,a\n\n1,2\n', 'line 3: 2 fields, not 3'),
        (b'epoch,iter,a\n1,2,x\n', "line 2: could not convert string to float: 'x'"),
        (b'epoch,iter,a\n1,2.5,1\n', 'line 2'),
        (b'epoch,iter,a\n1,,1\n', 'line 2: iter does not ascend'),
        (b'epoch,iter\n1' + b'0' * 400 + b',20\n', 'line 2: epoch or iter is too large'),
        (b'epoch,iter\n2,20\n1,10\n', 'line 3: iter does not ascend'),
        (b'epoch,iter\n1,10\n1,10\n', 'line 3: iter does not ascend'),
    ],
)
def test_damaged_csv_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        History.from_csv(text)


def test_rows_of_the_same_or_later_iterations_give_way(history):
    history.add(row(3, 30))
    history.add(row(2, 20, own=1.0))
    assert [(r['epoch'], r.get('own')) for r in history.rows] == [(1, None), (2, 1.0)]
    history.cut(19)
    assert [r['epoch'] for r in history.rows] == [1]
    history.cut(0)
    assert history.rows == [] and history.unit == 'epoch'


def test_curve_and_best(history):
    assert history.curve('val/loss') == {1: 1 / 3}
    assert history.best('coco/segm_mAP') == (2, 0.3)
    assert history.best('train/loss', less=True) == (2, 0.2)
    assert history.best('none') is None
    assert best_of({1: math.nan, 2: 0.5, 3: 0.5}) == (2, 0.5)
    by_iteration = History([row(None, 500), row(None, 1000)])
    assert by_iteration.unit == 'iter'
    assert by_iteration.curve('train/loss') == {500: 0.008, 1000: 0.004}
