"""The config and the checkpoints of a run, and the runs that were perhaps meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmfinetune.weights import work_dir
from mmfinetune.weights.work_dir import RunFiles, best_checkpoint, candidates, find_run
from tests.builders.errors import codes, refused


def make_run(folder: Path, *checkpoints: str, config: str = 'cfg.py') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for age, name in enumerate([config, *checkpoints]):
        (folder / name).write_text('')
        os.utime(folder / name, (1000 + age, 1000 + age))
    return folder


def test_config_and_best_checkpoint(tmp_path):
    run = make_run(tmp_path / 'run', 'best_coco_segm_mAP_epoch_2.pth', 'epoch_3.pth')
    assert find_run(run) == RunFiles(run, run / 'cfg.py', run / 'best_coco_segm_mAP_epoch_2.pth')


def test_last_checkpoint_where_none_is_best(tmp_path):
    run = make_run(tmp_path / 'run', 'epoch_1.pth', 'epoch_2.pth')
    (run / 'last_checkpoint').write_text('/another/machine/run/epoch_2.pth')
    assert find_run(run).checkpoint == run / 'epoch_2.pth'


def test_of_several_configs_the_newest(tmp_path):
    run = make_run(tmp_path / 'run', 'best_x.pth', config='b.py')
    (run / 'a.py').write_text('')
    assert find_run(run).config == run / 'a.py'


def test_what_is_named_wins(tmp_path):
    run = make_run(tmp_path / 'run', 'best_x.pth', 'epoch_1.pth')
    own = tmp_path / 'own.py'
    own.write_text('')
    found = find_run(run, own, run / 'epoch_1.pth')
    assert (found.config, found.checkpoint) == (own, run / 'epoch_1.pth')


def test_a_checkpoint_elsewhere_will_do_for_a_run_without_one(tmp_path):
    run = make_run(tmp_path / 'run')
    other = make_run(tmp_path / 'other', 'epoch_1.pth') / 'epoch_1.pth'
    assert find_run(run, checkpoint=other).checkpoint == other


def test_misspelt_folder_names_the_nearest_runs(tmp_path):
    for name in ('mask_rcnn', 'zebra'):
        make_run(tmp_path / name, 'best_x.pth')
    (tmp_path / 'no_run').mkdir()
    with refused('run-missing', path=tmp_path / 'mask_rcn') as caught:
        find_run(tmp_path / 'mask_rcn')
    assert caught.value.hint.endswith(f'did you mean {tmp_path / "mask_rcnn"} or {tmp_path / "zebra"}?')


@pytest.mark.parametrize('given', ['work_dirs', 'work_dirs/run/20260101_000000'])
def test_folder_above_or_below_a_run(tmp_path, given):
    run = make_run(tmp_path / 'work_dirs/run', 'best_x.pth')
    (run / '20260101_000000').mkdir()
    with refused('run-missing', path=tmp_path / given) as caught:
        find_run(tmp_path / given)
    assert caught.value.hint.endswith(f'did you mean {run}?')


def test_no_run_anywhere_near(tmp_path):
    with refused('run-missing', path=tmp_path / 'nothing/here', near='') as caught:
        find_run(tmp_path / 'nothing/here')
    assert 'work_dirs/' in caught.value.hint


def test_no_checkpoint_yet(tmp_path):
    with refused('checkpoint-none', work_dir=tmp_path / 'run'):
        find_run(make_run(tmp_path / 'run'))


def test_a_file_instead_of_a_folder(tmp_path):
    run = make_run(tmp_path / 'run', 'best_x.pth')
    with refused('run-file', path=run / 'best_x.pth', folder=run) as caught:
        find_run(run / 'best_x.pth')
    assert str(run) in caught.value.hint


def test_named_files_must_be_there(tmp_path):
    run = make_run(tmp_path / 'run', 'epoch_1.pth', 'epoch_2.pth')
    with refused('run-config', path=tmp_path / 'no.py'):
        find_run(run, config=tmp_path / 'no.py')
    with refused('run-checkpoint', path=run / 'epoch_9.pth', found='epoch_1.pth, epoch_2.pth'):
        find_run(run, checkpoint=run / 'epoch_9.pth')


def test_best_checkpoint_is_the_newest_best(tmp_path):
    for age, name in (
        (20, 'best_coco_segm_mAP_epoch_9.pth'),
        (10, 'best_coco_segm_mAP_epoch_10.pth'),
        (0, 'epoch_12.pth'),
    ):
        (tmp_path / name).touch()
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_12.pth'))
    assert best_checkpoint(tmp_path).name == 'best_coco_segm_mAP_epoch_10.pth'


def test_last_checkpoint_where_there_is_no_best(tmp_path):
    (tmp_path / 'epoch_3.pth').touch()
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/on/another/machine/epoch_3.pth\n')
    assert best_checkpoint(tmp_path) == tmp_path / 'epoch_3.pth'


@pytest.mark.parametrize('pointer', [None, '/gone/epoch_3.pth'])
def test_no_checkpoint(tmp_path, pointer):
    if pointer:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    with refused('checkpoint-none', work_dir=tmp_path):
        best_checkpoint(tmp_path)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A work dir: epochs 1 and 2, then 30 steps; the best is none to resume from."""
    for age, name in (
        (30, 'epoch_1.pth'),
        (20, 'epoch_2.pth'),
        (10, 'iter_30.pth'),
        (0, 'best_coco_segm_mAP_epoch_2.pth'),
    ):
        (tmp_path / name).touch()
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    return tmp_path


# Empty: killed as it was written; gone: killed before the file came, or the file was removed.
@pytest.mark.parametrize(
    ('pointer', 'expected'),
    [
        (None, ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        ('', ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        ('runs/iter_40.pth', ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        ('/other/machine/iter_30.pth\n', ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        # As in a copy that did not keep the times.
        ('epoch_2.pth', ['epoch_2.pth', 'iter_30.pth', 'epoch_1.pth']),
    ],
)
def test_candidates_to_resume_from(saved, pointer, expected):
    if pointer is not None:
        (saved / 'last_checkpoint').write_text(pointer)
    assert [path.name for path in candidates(saved)] == expected


@pytest.mark.parametrize('pointer', [b'\xff\xfe\xfa', b'\x80abc', b'x' * 5000, b'epoch_1\0.pth', 'a folder'])
def test_a_pointer_that_is_no_text_is_told_and_not_followed(saved, monkeypatch, pointer):
    told: list = []
    monkeypatch.setattr(work_dir, 'warn', told.append)
    if pointer == 'a folder':
        (saved / 'last_checkpoint').mkdir()
    else:
        (saved / 'last_checkpoint').write_bytes(pointer)
    assert [path.name for path in candidates(saved)] == ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']
    # Python itself says that there is no file of a name with a NUL in it.
    expected = [] if pointer == b'epoch_1\0.pth' else ['last-checkpoint-unreadable']
    assert codes(told) == expected and all(m.facts['path'] == saved / 'last_checkpoint' for m in told)
    assert best_checkpoint(saved).name == 'best_coco_segm_mAP_epoch_2.pth'


def test_no_candidates(tmp_path):
    assert candidates(tmp_path / 'nowhere') == candidates(tmp_path) == []
