"""tools/split_dataset.py as a process: exit codes, messages, files."""

from __future__ import annotations

import json
import os

import pytest

from tests.builders.runs import TOOLS, drive, files_in, spawn
from tests.data.test_split import coco, many, save

TOOL = TOOLS / 'split_dataset.py'


def test_the_tool_splits_and_says_where(tmp_path):
    save(tmp_path, coco(many(60)))
    done = drive('split_dataset', tmp_path, '--ratios', 60, 20, 20, '--seed', 2)
    assert done.code == 0, done.err
    paths = [tmp_path / f'annotations/instances_{s}.json' for s in ('train', 'val', 'test')]
    assert done.last_lines(1) == [f'Written: {" ".join(map(str, paths))}']
    sizes = [len(json.loads(p.read_text())['images']) for p in paths]
    assert sum(sizes) == 60
    assert 33 <= sizes[0] <= 39
    assert 'Largest deviation' in done.out


def test_no_hash_seed_changes_the_split(tmp_path):
    save(tmp_path / 'a', coco(many(60)))
    found = []
    for seed in ('1', '2'):
        out = tmp_path / seed
        old = os.environ.get('PYTHONHASHSEED')
        os.environ['PYTHONHASHSEED'] = seed
        try:
            done = spawn(TOOL, tmp_path / 'a', '--out', out, '--group-by', r'^\d{3}')
        finally:
            os.environ.pop('PYTHONHASHSEED')
            if old is not None:
                os.environ['PYTHONHASHSEED'] = old
        assert done.code == 0, done.err
        found.append([p.read_bytes() for p in sorted(out.iterdir())])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ('args', 'code'),
    [
        (['missing.json'], 'coco-missing'),
        (['.', '--ratios', '70'], 'split-ratios'),
        (['.', '--group-by', '('], 'split-pattern'),
        (['.', '--seed', '-1'], 'split-seed'),
        (['.', '--seed', '4294967295'], 'split-seed'),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(tmp_path, monkeypatch, args, code):
    save(tmp_path, coco(many(20)))
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    done = drive('split_dataset', *args)
    assert done.code == 2
    assert done.error == code and 'Traceback' not in done.err
    assert files_in(tmp_path) == before


def test_an_out_folder_that_is_a_file_is_named(tmp_path):
    save(tmp_path, coco(many(20)))
    (tmp_path / 'file').touch()
    done = drive('split_dataset', tmp_path, '--out', tmp_path / 'file')
    assert done.code == 2
    assert done.error == 'file-not-writable'
