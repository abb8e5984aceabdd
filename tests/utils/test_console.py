"""What tools show, on a terminal and in a pipe."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfinetune.utils import console
from tests.builders.terminals import Shown, in_terminal

CONTROL = re.compile(r'[\x00-\x09\x0b-\x1f\x7f]')

TOOL = """
import logging, os, sys, time, warnings
from mmfinetune.apis.cli import make_parser, run
from mmfinetune.utils import console
from mmfinetune.utils.errors import UserError

def main():
    make_parser('A tool.', 'tool').parse_args()
    {body}

run(main)
"""


def tool(folder: Path, body: str) -> Path:
    """A tool whose ``main`` does this."""
    path = folder / 'tool.py'
    path.write_text(TOOL.format(body='\n    '.join(body.strip().splitlines())))
    return path


def piped(path: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, path, *args], capture_output=True, text=True, check=False, timeout=60)


def left(shown: Shown) -> list[str]:
    return [line for line in shown.lines if line]


STATUS = """
console.status('one')
console.status('two', 'more')
print('kept')
console.status('three')
"""


def test_status_is_overwritten_and_makes_room(tmp_path):
    shown = in_terminal(tool(tmp_path, STATUS))
    assert shown.code == 0 and shown.states == ['one', 'two more', 'three']
    assert left(shown) == ['kept']


@pytest.mark.parametrize('change', [{'TERM': 'dumb'}, {'RANK': '1'}])
def test_no_status_line(tmp_path, change):
    shown = in_terminal(tool(tmp_path, STATUS), env=change)
    assert shown.raw == 'kept\n'


def test_no_status_line_in_a_pipe_nor_if_verbose(tmp_path):
    done = piped(tool(tmp_path, STATUS))
    assert (done.stdout, done.stderr) == ('kept\n', '')
    assert in_terminal(tmp_path / 'tool.py', '--verbose').raw == 'kept\n'


@pytest.mark.parametrize(('columns', 'state'), [(80, 'epoch 1 eta 0:10'), (300, 'epoch 1 eta 0:10 ' + 'x' * 80)])
def test_status_fits_the_terminal(tmp_path, columns, state):
    path = tool(tmp_path, "console.status('epoch 1', 'x' * 100, '', 'eta 0:10', 'x' * 80)\nconsole.status('y' * 400)")
    shown = in_terminal(path, columns=columns)
    assert shown.states == [state, 'y' * min(100, columns - 1)]


def test_cursor_is_never_hidden_and_a_stop_has_a_line_of_its_own(tmp_path):
    path = tool(tmp_path, "console.status('step 7')\ntime.sleep(60)")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        sent = []

        def stop(text, process, number=number, sent=sent):
            if 'step 7' in text and not sent:
                sent.append(process.send_signal(number))

        shown = in_terminal(path, seen=stop)
        assert shown.code == code
        assert left(shown) == ['step 7', f'Stopped by {signal.Signals(number).name}']
        assert not re.search(r'\x1b\[\?|\x1b\[[0-9;]*m$', shown.raw)


ERROR = """
print('warning: mind the gap', file=sys.stderr)
print('an error: in the middle')
raise UserError('test-broken', 'It broke', ['error: here'])
"""


def test_colour_is_for_terminals(tmp_path):
    path = tool(tmp_path, ERROR)
    plain = 'warning: mind the gap\nan error: in the middle\nerror[test-broken]: It broke\n  - error: here\n'
    shown = in_terminal(path)
    assert shown.raw == plain.replace('warning:', '\x1b[33mwarning\x1b[0m:').replace(
        'error[test-broken]', '\x1b[31merror[test-broken]\x1b[0m'
    )
    assert in_terminal(path, env={'NO_COLOR': '1'}).raw == plain
    assert in_terminal(path, env={'TERM': 'dumb'}).raw == plain
    done = piped(path)
    assert done.stdout + done.stderr == 'an error: in the middle\n' + plain.replace('an error: in the middle\n', '')


@pytest.mark.parametrize(('body', 'said'), [('', 'Loading…'), ("sys.modules['torch'] = sys", 'Loading PyTorch…')])
def test_a_second_of_nothing_is_explained(tmp_path, body, said):
    path = tool(tmp_path, f'{body}\ntime.sleep(1.5)\nprint("done")')
    shown = in_terminal(path)
    assert shown.states == [said] and left(shown) == ['done']
    assert piped(path).stdout == 'done\n'


def test_who_has_said_something_explains_nothing(tmp_path):
    assert not in_terminal(tool(tmp_path, 'print("busy")\ntime.sleep(1.3)')).states


CHATTER = """
import json, tempfile
from pycocotools.coco import COCO
with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
    file.write('{"images": [], "annotations": [], "categories": []}')
    file.flush()
    COCO(file.name)
print('Done (t=0.01s) means nothing in a line of ours')
warnings.warn_explicit('use the other one', FutureWarning, warnings.__file__, 1)
warnings.warn_explicit('foo is deprecated', UserWarning, warnings.__file__, 2)
warnings.warn_explicit('is all right?', UserWarning, warnings.__file__, 3)
warnings.warn_explicit('mine is deprecated', FutureWarning, 'mine.py', 4)
logger = logging.Logger('run')
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.addHandler(logging.FileHandler(sys.argv[0] + '.log'))
console.adopt(logger)
logger.info('hooks: many')
logger.info('Epoch 1', extra=console.SHOWN)
logger.warning('look here')
logger.warning('bar will be removed in the next release')
"""


def test_libraries_speak_to_the_log(tmp_path):
    path = tool(tmp_path, CHATTER)
    done, log = piped(path), tmp_path / 'tool.py.log'
    ours = ['Done (t=0.01s) means nothing in a line of ours', 'Epoch 1', 'warning: look here']
    assert done.stdout.splitlines() == ours
    assert re.findall(r'^(\S+?):(\d+): ', done.stderr, re.MULTILINE)[0][1] == '3'
    assert done.stderr.count('Warning: ') == 2 and 'mine.py:4' in done.stderr
    text = log.read_text()
    for line in ('loading annotations into memory...', 'index created!', 'use the other one', 'foo is deprecated'):
        assert text.count(line) == 1
    for line in ('hooks: many', 'Epoch 1', 'look here', 'bar will be removed'):
        assert text.count(line) == 1
    log.unlink()
    loud = piped(path, '--verbose')
    for line in (
        'loading annotations into memory...',
        'index created!',
        'hooks: many',
        'bar will be removed',
        *ours[:2],
    ):
        assert loud.stdout.count(line) == 1
    assert loud.stderr.count('Warning: ') == 4


BAR = """
for _ in console.bar(range(3), desc='work', mininterval=0):
    time.sleep(0.1)
for _ in console.bar(range(3), wanted=False, desc='quiet', mininterval=0):
    pass
print('done')
"""


@pytest.mark.parametrize('columns', [60, 200])
def test_bars_go_when_the_work_is_done(tmp_path, columns):
    path = tool(tmp_path, BAR)
    shown = in_terminal(path, columns=columns)
    assert 'work' in shown.raw and 'quiet' not in shown.raw
    assert left(shown) == ['done']
    assert max(map(len, re.split(r'[\r\n]', shown.raw))) <= min(100, columns)
    done = piped(path)
    assert (done.stdout, done.stderr) == ('done\n', '')


def test_a_fork_cannot_block_on_the_line(tmp_path):
    path = tool(
        tmp_path,
        """
console._screen._lock.acquire()
import threading
threading.Thread(target=console._screen._lock.acquire, daemon=True).start()
console._screen._lock.release()
time.sleep(0.1)
child = os.fork()
if not child:
    print('child')
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
""",
    )
    start = time.monotonic()
    assert 'child' in in_terminal(path).raw and time.monotonic() - start < 20


def test_wrapped_keeps_words_and_short_lines():
    path = '/'.join(['folder'] * 20)
    text = console.wrapped(f'a  b\n{"word " * 30}{path}')
    lines = text.split('\n')
    assert lines[0] == 'a  b' and lines[-1] == f'  {path}'
    assert all(len(line) <= 100 for line in lines[:-1])
    assert text.split() == ['a', 'b', *['word'] * 30, path]


def test_fit_leaves_out_what_has_no_room():
    assert console.fit(['a', '', 'b' * 99, 'c']) == 'a  c'
    assert console.fit(['a', 'b' * 97]) == 'a  ' + 'b' * 97


def test_control_characters_stay_out_of_a_pipe(tmp_path):
    for body in (STATUS, ERROR, BAR):
        done = piped(tool(tmp_path, body))
        assert not CONTROL.search(done.stdout + done.stderr)
