from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmfinetune.utils.errors import UserError
from mmfinetune.weights.work_dir import RunFiles, find_run


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
    with pytest.raises(UserError, match='There is no folder') as caught:
        find_run(tmp_path / 'mask_rcn')
    assert caught.value.cure == f'did you mean {tmp_path / "mask_rcnn"} or {tmp_path / "zebra"}?'


@pytest.mark.parametrize('given', ['work_dirs', 'work_dirs/run/20260101_000000'])
def test_folder_above_or_below_a_run(tmp_path, given):
    run = make_run(tmp_path / 'work_dirs/run', 'best_x.pth')
    (run / '20260101_000000').mkdir()
    with pytest.raises(UserError, match='is no work dir of a run') as caught:
        find_run(tmp_path / given)
    assert caught.value.cure == f'did you mean {run}?'


def test_no_run_anywhere_near(tmp_path):
    with pytest.raises(UserError) as caught:
        find_run(tmp_path / 'nothing/here')
    assert 'pass the work dir of a training' in caught.value.cure


def test_no_checkpoint_yet(tmp_path):
    with pytest.raises(UserError, match='There is no checkpoint in .*, only the config cfg.py'):
        find_run(make_run(tmp_path / 'run'))


def test_a_file_instead_of_a_folder(tmp_path):
    run = make_run(tmp_path / 'run', 'best_x.pth')
    with pytest.raises(UserError, match='is a file') as caught:
        find_run(run / 'best_x.pth')
    assert str(run) in caught.value.cure


def test_named_files_must_be_there(tmp_path):
    run = make_run(tmp_path / 'run', 'epoch_1.pth', 'epoch_2.pth')
    with pytest.raises(UserError, match='There is no config'):
        find_run(run, config=tmp_path / 'no.py')
    with pytest.raises(UserError, match='There is no checkpoint') as caught:
        find_run(run, checkpoint=run / 'epoch_9.pth')
    assert 'holds epoch_1.pth, epoch_2.pth' in caught.value.cure
