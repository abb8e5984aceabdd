from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders.results import CAT, DOG, A, B, data_set, rows_of, write
from tests.builders.runs import REPO, drive, spawn

TOOL = REPO / 'tools/evaluate.py'
HEAVY = ('torch', 'torchvision', 'mmengine', 'mmdet', 'mmcv')


def imported(err: str) -> set[str]:
    """Of the output of ``python -X importtime``."""
    return {line.rpartition('|')[2].strip() for line in err.splitlines() if line.startswith('import time:')}


@pytest.fixture
def files(tmp_path: Path) -> list:
    return [
        '--predictions',
        write(tmp_path / 'p.json', rows_of([(1, CAT, A, 0.9)])),
        '--ann',
        write(tmp_path / 'a.json', data_set([(1, CAT, A), (2, DOG, B)])),
        '--out',
        tmp_path / 'out',
    ]


def test_saved_predictions_need_no_torch(files, tmp_path):
    done = spawn('-X', 'importtime', TOOL, *files, '--no-pictures')
    assert done.code == 0, done.err[-2000:]
    assert not imported(done.err) & set(HEAVY)
    assert 'hotcoco' in imported(done.err)
    assert done.last_lines(1)[0].startswith(f'Results: {tmp_path}/out/evaluation.md')
    assert json.loads((tmp_path / 'out/evaluation.json').read_text())['objects'] == 2


@pytest.mark.parametrize(
    ('arguments', 'code'),
    [
        ([], 'eval-nothing'),
        (['no_such_run'], None),
        (['--predictions', 'p.json'], 'eval-no-truth'),
        (['--predictions', 'p.json', '--ann', 'a.json'], None),
    ],
)
def test_errors_are_quick_and_clear(arguments, code):
    done = spawn('-X', 'importtime', TOOL, *arguments)
    assert done.code == 2
    assert done.error and code in (None, done.error)
    assert 'Traceback' not in done.err
    assert not imported(done.err) & set(HEAVY)


def test_images_of_saved_predictions_may_be_named_by_their_old_option(files, tmp_path):
    done = drive('evaluate', *files, '--data-root', tmp_path)
    assert (done.code, bool(done.error)) == (2, True)
    assert 'note: ' in done.err and '--image-root' in done.err


def test_options_reach_the_evaluation(files, tmp_path):
    done = drive(
        'evaluate', *files, '--engine', 'pycocotools', '--score-thr', '0.95', '--worst', '1', '--no-pictures', '--json'
    )
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data['engine'] == 'pycocotools'
    assert data['f1']['score_thr'] == data['confusion']['score_thr'] == 0.95
    assert len(data['worst']) == 1
    assert data['worst'][0]['what'] == 'missed: cat'
    assert not list(tmp_path.glob('out/*.png'))


def test_default_folder_of_saved_predictions(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = drive('evaluate', *files[:4], '--no-pictures')
    assert done.last_lines(1) == ['Results: work_dirs/evaluation/evaluation.md']


@pytest.mark.parametrize(
    'arguments',
    [
        ['--engine', 'rust'],
        ['--split', 'all'],
        ['--worst', 'x'],
        ['--worst', '-1'],
        ['--score-thr', '30'],
        ['--score-thr', 'nan'],
        ['a', '--run', 'b'],
    ],
)
def test_wrong_arguments(arguments):
    done = drive('evaluate', *arguments)
    assert done.code == 2
    assert 'usage: ' in done.err
