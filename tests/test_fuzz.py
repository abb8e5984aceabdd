"""A little of ``python -m tests.fuzz``, which has the time for more; a slow test gives it a minute for each target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import NAMES

ROOT = Path(__file__).parents[1]


def fuzz(folder: Path, *options: str) -> dict:
    command = [sys.executable, '-m', 'tests.fuzz', '--folder', str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads((folder / 'state.json').read_text())


def test_crafted_files_are_read_or_refused(tmp_path):
    state = fuzz(tmp_path, '--inputs', '25')
    assert state['next'] == dict.fromkeys(NAMES, 25)
    assert all(state['outcomes'][name]['refused'] for name in NAMES)


@pytest.mark.slow
def test_many_crafted_files_are_read_or_refused(tmp_path):
    state = fuzz(tmp_path, '--seconds', str(60 * len(NAMES)), '--seed', 'slow')
    assert min(state['next'].values()) > 100
