"""The language of the tools: one meaning and one wording of an option wherever it stands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import subprocess
import sys

import pytest

from mmfinetune.apis import cli, predict, train
from mmfinetune.utils.text import table as text_table
from tests.builders.locales import LOCALES, shell
from tests.builders.runs import TOOLS

NO_OPTIONS = ('check_platform',)  # it must run on any Python 3
# Options that mean one thing, but of which a tool takes more.
WIDER = {('train_pretrained', '--batch-size'): 'auto', ('train_pretrained', '--checkpoint'): 'a URL too'}
ALL = sorted(path.stem for path in TOOLS.glob('*.py') if path.stem not in NO_OPTIONS)


class Parsed(Exception):
    """Carries a tool's parser out of its main."""


@pytest.fixture(scope='module')
def parsers() -> dict[str, cli.Parser]:
    """The parser of each tool, as its main makes it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, *args, **kwargs):
            raise Parsed(self)

        patch.setattr(cli.Parser, 'parse_args', stop)
        for name in ALL:
            with pytest.raises(Parsed) as caught:
                runpy.run_path(str(TOOLS / f'{name}.py'))['main']()
            [found[name]] = caught.value.args
    return found


def options(parser: cli.Parser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings if name.startswith('--')}


def test_options_of_several_tools_are_shared(parsers):
    tools = {}
    for tool, parser in parsers.items():
        for name in options(parser):
            tools.setdefault(name, []).append(tool)
    several = {name: where for name, where in tools.items() if len(where) > 1 and name != '--help'}
    assert {name: where for name, where in several.items() if name not in cli.SHARED} == {}


@pytest.mark.parametrize('tool', ALL)
def test_shared_options_mean_the_same_everywhere(parsers, tool):
    plain = argparse.ArgumentParser()
    for name, action in options(parsers[tool]).items():
        if name not in cli.SHARED:
            continue
        shared = plain.add_argument(name, **cli.SHARED[name])
        assert action.help.startswith(cli.SHARED[name]['help']), name
        assert (type(action), action.nargs, action.dest) == (type(shared), shared.nargs, shared.dest), name
        if (tool, name) not in WIDER:
            assert action.type == shared.type, name


@pytest.mark.parametrize('tool', ALL)
def test_old_names_lead_to_options_that_exist(parsers, tool):
    parser = parsers[tool]
    assert set(parser.old_options.values()) <= set(options(parser))
    assert not set(parser.old_options) & set(options(parser))


def test_docs_hold_both_tables(parsers):
    """A difference shows the text that belongs there."""
    rows = [('option', 'meaning', 'tools')]
    for name, settings in cli.SHARED.items():
        having = [tool for tool in ALL if name in options(parsers[tool])]
        where = 'all' if having == ALL else ', '.join(f'`{tool}`' for tool in having)
        rows.append((f'`{name}`', settings['help'].replace('%(default)s', str(settings.get('default'))), where))
    codes = [('exit code', 'meaning'), *cli.EXIT_CODES.items()]
    text = (TOOLS.parent / 'docs/tools.md').read_text()
    for table in (rows, codes):
        assert text_table(table, left=3, markdown=True) in text


@pytest.mark.parametrize('tool', ALL)
def test_help_states_the_exit_codes(parsers, tool):
    text = parsers[tool].format_help()
    for code, meaning in cli.EXIT_CODES.items():
        assert f'  {code:<9} {meaning}' in text


@pytest.mark.parametrize(
    ('tool', 'options', 'given'),
    [('train_pretrained', train.Options, ['a.py']), ('predict', predict.Options, ['a.jpg'])],
)
def test_defaults_of_parser_and_options_agree(parsers, tool, options, given):
    args = vars(parsers[tool].parse_args(given))
    needed = [f.name for f in dataclasses.fields(options) if f.default is f.default_factory is dataclasses.MISSING]
    assert options(**args) == options(**{name: args[name] for name in needed})


def parser_with_old_name() -> cli.Parser:
    parser = cli.make_parser('A tool.', 'tool a')
    cli.add(parser, '--classes', '--workers', '--score-thr', '--image-root')
    cli.old_option(parser, '--images', new='--image-root')
    return parser


@pytest.mark.parametrize('words', [['--images', 'x'], ['--images=x']])
def test_old_name_works_with_a_note(capsys, words):
    args = parser_with_old_name().parse_args(words)
    assert str(args.image_root) == 'x'
    err = capsys.readouterr().err
    assert err.count('note: ') == 1 and '--images' in err and '--image-root' in err


def test_new_name_gives_no_note(capsys):
    parser_with_old_name().parse_args(['--image-root', 'x'])
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    ('words', 'classes', 'notes'), [(['a', 'b c'], ['a', 'b c'], 0), (['a, b'], ['a', 'b'], 1), (['a'], ['a'], 0)]
)
def test_classes_are_words(capsys, words, classes, notes):
    assert parser_with_old_name().parse_args(['--classes', *words]).classes == classes
    assert capsys.readouterr().err.count('note: ') == notes


@pytest.mark.parametrize(
    'words',
    [
        ['--workers', '0'],
        ['--workers', '-1'],
        ['--workers', 'x'],
        ['--workers', '1.5'],
        ['--score-thr', '1.1'],
        ['--score-thr', 'nan'],
        ['--score-thr', 'x'],
        ['--classes', 'a,,b'],
    ],
)
def test_bad_values_are_refused_without_private_names(capsys, words):
    with pytest.raises(SystemExit) as stop:
        parser_with_old_name().parse_args(words)
    assert stop.value.code == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert 'Traceback' not in message and 'invalid positive_int' not in message and 'invalid share' not in message


# The same as a tool does: names of a file in UTF-8, read by pycocotools and printed.
NAMES = """
import sys
from mmfinetune.apis.cli import run

def main():
    from pycocotools.coco import COCO
    names = [c['name'] for c in COCO(sys.argv[1]).dataset['categories']]
    assert names == ['nut', 'gr\\u00f6\\u00dfe', '\\u56fe', 'x\\udc80'], ascii(names)
    print(*names, '\\u2026', sys.argv[2] == names[1])
    print(*names, '\\u2026', file=sys.stderr)

run(main)
"""


@pytest.mark.parametrize('coding', LOCALES)
def test_files_are_utf8_and_the_terminal_is_what_it_is(tmp_path, coding):
    names = ['nut', 'größe', '图', 'x\udc80']
    content = json.dumps({'categories': [{'id': k, 'name': n} for k, n in enumerate(names, 1)]}, ensure_ascii=False)
    (tmp_path / 'a.json').write_bytes(content.replace('\udc80', '\\udc80').encode())
    (tmp_path / 'tool.py').write_text(NAMES)
    command = [sys.executable, tmp_path / 'tool.py', tmp_path / 'a.json', 'größe'.encode()]
    done = subprocess.run(command, env=shell(coding, tmp_path), capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    shown = ' '.join(names).encode(coding, 'backslashreplace') + ' …'.encode(coding, 'backslashreplace')
    assert done.stdout.splitlines()[-1] == shown + b' True'
    assert done.stderr.splitlines()[-1] == shown


def test_a_program_that_calls_a_tool_is_not_started_again(monkeypatch):
    monkeypatch.setattr(cli.locale, 'getpreferredencoding', lambda _: 'gbk')
    monkeypatch.setattr(cli.os, 'execv', lambda *_: pytest.fail('started again'))
    monkeypatch.setattr(sys, 'argv', ['tool.py'])
    with pytest.raises(SystemExit):
        cli.run(lambda: 0)
