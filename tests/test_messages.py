"""All messages of the package: each has a code, and one file holds the wording.

``MMFINETUNE_UPDATE=1 pytest tests/test_messages.py`` (or ``make messages``) writes ``tests/messages.txt`` again after a
change of wording; read its diff before you commit it.
"""

from __future__ import annotations

import ast
import os
import re
import string
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name('messages.txt')
CODE = re.compile(r'[a-z][a-z0-9]*(-[a-z0-9]+)+')
# What a native reader stumbles at, and the field's word for it. See CONTRIBUTING.md.
RETIRED = {
    r'\bmend': 'fix',
    r'\banew\b': 're-…, again',
    r'\bshall\b': 'will, must',
    r'\bto be had\b|\bbe had\b': 'not available',
    r'\b(lies|lie) elsewhere\b': 'is elsewhere',
    r'\bgo(es)? on with\b': 'continue with',
    r'\bis there already\b': 'already exists',
    r'\bis no (config|folder|file|COCO|image|directory|number|checkpoint)\b': 'is not a …',
    r'\bcomes twice\b': 'is duplicated',
    r'\bheld against\b': 'compared with',
    r'\bat odds\b': 'disagree',
    r'\bbroken off\b': 'interrupted',
    r'\bof one\'s own\b': 'your own',
    r'\bnot told\b': 'unknown, not recorded',
    r'\bdrawn anew\b': 're-initialized',
}
PROSE = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


@dataclass(frozen=True)
class Call:
    """A place where a message is made."""

    place: str
    code: str | None
    text: str | None
    hint: str
    facts: frozenset[str]
    open: bool  # takes facts from a variable


def _constant(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _calls(path: Path, kinds: set[str]) -> Iterator[Call]:
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
        texts = [_constant(argument) for argument in node.args]
        pair = next(
            ((a, b) for a, b in zip(texts, texts[1:], strict=False) if a and b and CODE.fullmatch(a) and ' ' in b), None
        )
        # A function that passes a code on, such as a record's `problem(code, text, **facts)`, is found by its callers.
        passed_on = len(node.args) >= 2 and all(isinstance(a, (ast.Name, ast.Attribute, ast.Starred)) for a in node.args)
        if pair is None and (name not in kinds or passed_on):
            continue
        hint = next((_constant(k.value) or '' for k in node.keywords if k.arg == 'hint'), '')
        yield Call(
            f'{path.relative_to(ROOT)}:{node.lineno}',
            *(pair or (None, None)),
            hint,
            frozenset(k.arg for k in node.keywords if k.arg),
            any(k.arg is None for k in node.keywords),
        )


def _kinds() -> set[str]:
    """`Message`, `UserError` and its subclasses."""
    kinds = {'Message', 'UserError'}
    for path in (ROOT / 'mmfinetune').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ClassDef) and {getattr(b, 'id', '') for b in node.bases} & kinds:
                kinds.add(node.name)
    return kinds


@pytest.fixture(scope='module')
def calls() -> list[Call]:
    kinds = _kinds()
    files = sorted([*(ROOT / 'mmfinetune').rglob('*.py'), *(ROOT / 'tools').glob('*.py')])
    return [
        call for path in files if path.name != 'errors.py' or path.parent.name != 'utils' for call in _calls(path, kinds)
    ]


def test_each_message_has_a_code_and_a_constant_wording(calls):
    assert len(calls) > 100
    assert [call.place for call in calls if call.code is None] == []


def test_a_code_has_one_wording(calls):
    wordings = defaultdict(set)
    for call in calls:
        if call.code:
            wordings[call.code].add(call.text)
    assert {code: texts for code, texts in wordings.items() if len(texts) > 1} == {}


def test_messages_show_facts_that_they_have(calls):
    lacking = {
        call.place: shown - call.facts
        for call in calls
        if call.code and not call.open and call.facts
        for shown in [
            {
                re.split(r'[.\[]', name)[0]
                for text in (call.text, call.hint)
                for _, name, _, _ in string.Formatter().parse(text)
                if name
            }
        ]
        if not shown <= call.facts
    }
    assert lacking == {}


def test_wording_is_that_of_the_golden_file(calls):
    entries = {}
    for call in calls:
        if call.code:
            entries.setdefault(call.code, (call.text, set()))[1].update([call.hint] if call.hint else [])
    lines = []
    for code, (text, hints) in sorted(entries.items()):
        lines += [code, *(f'    {line}' for line in text.splitlines()), *(f'    Hint: {hint}' for hint in sorted(hints))]
    found = '\n'.join(lines) + '\n'
    if os.environ.get('MMFINETUNE_UPDATE'):
        GOLDEN.write_text(found, encoding='utf-8')
    assert GOLDEN.read_text(encoding='utf-8') == found, 'run `make messages`, then read the diff'


@pytest.mark.parametrize('path', [GOLDEN, *PROSE], ids=lambda p: p.name)
def test_retired_words_stay_away(path):
    found = [
        f'{number}: {match.group()} -> {better}'
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
        for pattern, better in RETIRED.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]
    assert found == []
