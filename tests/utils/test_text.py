"""Tables, counts, times and suggestions."""

from __future__ import annotations

import csv
import io
import math

import pytest

from mmfinetune.utils.text import cell, csv_text, duration, is_number, near, plural, table

ROWS = [['class', 'objects', 'AP'], ['cat', 1234, '0.5'], ['dining table', 7, '-']]


def test_columns_are_aligned_and_integers_get_separators():
    assert table(ROWS).splitlines() == [
        'class         objects   AP',
        'cat             1,234  0.5',
        'dining table        7    -',
    ]


def test_markdown_table():
    assert table(ROWS, left=2, markdown=True).splitlines() == [
        '| class        | objects |  AP |',
        '| ------------ | ------- | --: |',
        '| cat          | 1,234   | 0.5 |',
        '| dining table | 7       |   - |',
    ]


@pytest.mark.parametrize('markdown', [False, True])
def test_a_table_without_rows_is_empty(markdown):
    assert table(ROWS[:1], markdown=markdown) == ''


def test_cells_of_a_markdown_table_cannot_break_it():
    line = table([['name'], ['a|b\n<script>']], markdown=True).splitlines()[-1]
    assert line == r'| a\|b \<script> |'
    assert cell(cell('a|b <c>')) == cell('a|b <c>') == r'a\|b \<c>'


def test_csv_keeps_digits_and_quotes():
    rows = [['a', 'b'], [0.1 + 0.2, 'x,"y"\nz']]
    assert list(csv.reader(io.StringIO(csv_text(rows)))) == [['a', 'b'], ['0.30000000000000004', 'x,"y"\nz']]


@pytest.mark.parametrize(
    ('count', 'words', 'text'),
    [
        (0, ('error',), '0 errors'),
        (1, ('error',), '1 error'),
        (1234, ('error',), '1,234 errors'),
        (2, ('class', 'classes'), '2 classes'),
        (1, ('class', 'classes'), '1 class'),
    ],
)
def test_plural(count, words, text):
    assert plural(count, *words) == text


def test_near():
    words = ('max_epochs', 'max_iters', 'val_interval')
    assert near('max_epoch', words) == 'did you mean max_epochs?'
    assert near('max_epoch', words, '; ', 0.5, 2) == '; did you mean max_epochs or max_iters?'
    assert near('zzz', words, '; ') == ''


def test_duration():
    assert [duration(s) for s in (0, 2.54, 59.4, 59.9, 3725.4, 360000)] == [
        '0.0 s',
        '2.5 s',
        '59.4 s',
        '0:01:00',
        '1:02:05',
        '100:00:00',
    ]
    assert duration(float('inf')) == 'inf s'


@pytest.mark.parametrize('value', [0, -1, 2.5, 10**300])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize('value', [True, None, '1', [1], math.nan, math.inf, 10**400])
def test_no_numbers(value):
    assert not is_number(value)
