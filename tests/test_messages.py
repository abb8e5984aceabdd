"""All messages of the package: each has a code, and ``mmfinetune/utils/messages.yaml`` alone holds the wording."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mmfinetune.utils.errors import wordings

ROOT = Path(__file__).parents[1]
WORDINGS = ROOT / 'mmfinetune/utils/messages.yaml'
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
    r'(?<!there )\bis no (config|folder|file|COCO|image|directory|number|checkpoint)\b': 'is not a …',
    r'\bcomes twice\b': 'is duplicated',
    r'\bheld against\b': 'compared with',
    r'\bat odds\b': 'disagree',
    r'\bbroken off\b': 'interrupted',
    r"\bof one's own\b": 'your own',
    r'\bnot told\b': 'unknown, not recorded',
}
PROSE = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


@dataclass(frozen=True)
class Call:
    """A place where a message is made: its code if that is a constant, and the names of its facts."""

    place: str
    code: str | None
    facts: frozenset[str]
    open: bool  # takes facts from a variable, or brings its own wording


def _kinds() -> set[str]:
    """`Message`, `Problem`, `UserError` and its subclasses."""
    kinds = {'Message', 'Problem', 'UserError'}
    for path in (ROOT / 'mmfinetune').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ClassDef) and {getattr(b, 'id', '') for b in node.bases} & kinds:
                kinds.add(node.name)
    return kinds


def _calls(path: Path, kinds: set[str]) -> Iterator[Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
        if name not in kinds or not node.args:
            continue
        first = node.args[0]
        yield Call(
            f'{path.relative_to(ROOT)}:{node.lineno}',
            first.value if isinstance(first, ast.Constant) else None,
            frozenset(k.arg for k in node.keywords if k.arg),
            len(node.args) > 1 or any(k.arg is None for k in node.keywords),
        )


FILES = [
    path
    for path in sorted([*(ROOT / 'mmfinetune').rglob('*.py'), *(ROOT / 'tools').glob('*.py')])
    if path != ROOT / 'mmfinetune/utils/errors.py'
]


@pytest.fixture(scope='module')
def calls() -> list[Call]:
    kinds = _kinds()
    return [call for path in FILES for call in _calls(path, kinds)]


def placeholders(code: str) -> set[str]:
    texts = wordings()[code].values()
    names = [name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name]
    return {re.split(r'[.\[]', name)[0] for name in names}


def test_each_message_has_a_wording(calls):
    assert len(calls) > 300
    named = [call for call in calls if call.code]
    assert [c.place for c in named if not CODE.fullmatch(c.code) or (c.code not in wordings() and not c.open)] == []


def test_no_wording_is_left_over():
    constants = {
        node.value
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(wordings()) - constants == set()


def test_messages_have_the_facts_that_they_show(calls):
    lacking = {
        call.place: placeholders(call.code) - call.facts
        for call in calls
        if call.code in wordings() and not call.open and (call.facts - {'problems', 'hint'})
    }
    assert {place: names for place, names in lacking.items() if names} == {}


def test_the_wordings_are_in_order_and_well_formed():
    text = WORDINGS.read_text(encoding='utf-8')
    codes = re.findall(r'^([a-z0-9-]+):$', text, re.MULTILINE)
    assert codes == sorted(codes) and len(codes) == len(set(codes)) == len(yaml.safe_load(text))
    for code, entry in wordings().items():
        assert set(entry) <= {'text', 'hint'} and entry['text'] and all(isinstance(v, str) for v in entry.values()), (
            code
        )


@pytest.mark.parametrize('path', [WORDINGS, *PROSE], ids=lambda p: p.name)
def test_retired_words_stay_away(path):
    found = [
        f'{number}: {match.group()} -> {better}'
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
        for pattern, better in RETIRED.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]
    assert found == []
