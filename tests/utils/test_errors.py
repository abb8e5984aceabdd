from __future__ import annotations

import pickle
from pathlib import Path

from mmfinetune.utils.errors import Message, Problem, UserError


class _LongList(UserError):
    max_shown = 2


def error(kind=UserError):
    return kind(
        'file-odd',
        '{path} has {count:,} odd lines',
        ['a', 'b', 'c'],
        hint='look at {path}',
        path=Path('x{1}.json'),
        count=1234,
    )


def test_a_message_shows_its_facts():
    message = Message('file-odd', '{path}: {count:,} lines', path=Path('a.json'), count=1234)
    assert str(message) == 'a.json: 1,234 lines' == f'{message}'


def test_messages_are_equal_by_code_and_facts_whatever_the_wording():
    assert Message('a', '{n} things', n=1) == Message('a', 'things: {n}', n=1)
    assert Message('a', '{n}', n=1) != Message('a', '{n}', n=2)
    assert Message('a', '{n}', n=1) != Message('b', '{n}', n=1)
    assert len({Message('a', '{n}', n=[1]), Message('a', '{n}', n=[1])}) == 1


def test_text_without_facts_may_hold_braces():
    assert str(Message('a', 'a dict {x}')) == 'a dict {x}'


def test_an_error_lists_problems_and_ends_with_the_hint():
    assert str(error()).splitlines() == [
        'x{1}.json has 1,234 odd lines',
        '  - a',
        '  - b',
        '  - c',
        'Hint: look at x{1}.json',
    ]
    assert str(error(_LongList)).splitlines()[1:] == ['  - a', '  - b', '  … and 1 more', 'Hint: look at x{1}.json']


def test_a_value_of_any_length_makes_a_short_message():
    value = 'x' * 100_000
    error = UserError('a', '{path}: {value!r} is odd', hint='not {value!r}', path=f'/{"d" * 4000}', value=value)
    assert str(error.message) == f"/{'d' * 4000}: '{'x' * 298}… is odd" and len(str(error)) < 5000
    assert len(str(Message('a', '{value}', value=value))) == 5000
    assert error.facts['value'] == value


def test_an_error_comes_whole_out_of_a_worker_process():
    for kind in UserError, _LongList:
        there = error(kind)
        back = pickle.loads(pickle.dumps(there))
        assert type(back) is kind and str(back) == str(there) and back.message == there.message
        assert (back.problems, back.hint, back.code) == (there.problems, there.hint, 'file-odd')


def test_places_stand_in_front_of_a_problem():
    problem = Problem('mask-odd', 'an odd {kind}', kind='mask')
    assert str(problem) == 'an odd mask'
    message = problem.message.at('shape 3').at('a.json')
    assert str(message) == 'a.json: shape 3: an odd mask'
    assert (message.code, message.facts) == ('mask-odd', {'place': 'a.json: shape 3', 'kind': 'mask'})
    back = pickle.loads(pickle.dumps(problem))
    assert back.message == problem.message and str(back) == str(problem)
