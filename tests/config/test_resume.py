"""Which checkpoint is resumed, and which is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmfinetune.config.resume import VERSION, BatchSetup, set_resume, set_schedule, settings_of
from tests.builders.errors import codes, refused

BEFORE = {'processes': 2, 'batch_size': 2, 'accumulation': 3}


@pytest.fixture
def cfg(voc_cfg, tmp_path) -> Config:
    return Config(dict(copy.deepcopy(voc_cfg.to_dict()), work_dir=str(tmp_path)))


def set_batch(cfg: Config, batch: int, accumulate: int) -> None:
    cfg.train_dataloader.batch_size, cfg.optim_wrapper.accumulative_counts = batch, accumulate


def save_run(path: Path, setup: dict | None = None, **changes) -> Path:
    """A checkpoint; one with ``recipe`` in its ``meta`` is of the time before run states had versions."""
    state = {'version': 1, 'batch_setup': setup} if setup else {}
    info = {'runtime_info': {'mmfinetune': state}}
    content = {'state_dict': {}, 'optimizer': {}, 'message_hub': info, 'meta': {'seed': 7}, **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ('world', 'batch', 'accumulate', 'options'),
    [
        (1, 2, 3, '--batch-size 4 --accumulate 3'),
        (4, 2, 3, '--batch-size 1 --accumulate 3'),
        (3, 2, 3, '--gpus 2 --batch-size 2 --accumulate 3'),
        (2, 2, 1, '--batch-size 2 --accumulate 3'),
        (2, 6, 1, '--batch-size 2 --accumulate 3'),
    ],
)
def test_another_batch_is_refused_with_the_options_to_use(cfg, tmp_path, world, batch, accumulate, options):
    path = save_run(tmp_path / 'epoch_1.pth', BEFORE)
    set_batch(cfg, batch, accumulate)
    with refused('resume-other-batch', path=path, options=options, before=str(BatchSetup(**BEFORE))) as caught:
        set_resume(cfg, str(path), world)
    assert options in caught.value.hint and f'--weights {path}' in caught.value.hint


@pytest.mark.parametrize(('world', 'batch'), [(2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize('of_old', (False, True))
def test_the_same_batch_continues(cfg, tmp_path, world, batch, of_old):
    meta = {'meta': {'seed': 7, 'recipe': BEFORE}, 'message_hub': {}} if of_old else {}
    path = save_run(tmp_path / 'epoch_1.pth', None if of_old else BEFORE, **meta)
    set_batch(cfg, batch, 3)
    set_resume(cfg, str(path), world)
    assert (cfg.resume, cfg.load_from, cfg.randomness.seed) == (True, str(path), 7)


def test_another_batch_than_that_of_an_old_checkpoint_is_refused(cfg, tmp_path):
    path = save_run(tmp_path / 'epoch_1.pth', meta={'recipe': BEFORE})
    with refused('resume-other-batch'):
        set_resume(cfg, str(path), 1)


def test_auto_resumes_what_is_there(cfg, tmp_path, capsys):
    set_resume(cfg, 'auto', 1)
    assert not cfg.resume
    assert capsys.readouterr().out == f'There is nothing to resume in {tmp_path}: the run begins\n'
    path = save_run(tmp_path / 'epoch_1.pth', {'processes': 1, 'batch_size': 2, 'accumulation': 1})
    set_resume(cfg, 'auto', 1)
    assert cfg.resume and Path(cfg.load_from) == path


def test_auto_does_not_begin_again_where_all_is_damaged(cfg, tmp_path):
    (tmp_path / 'epoch_1.pth').write_bytes(b'')
    with pytest.raises(Exception, match='epoch_1.pth'):
        set_resume(cfg, 'auto', 1)


def test_nothing_to_resume(cfg, tmp_path):
    with refused('resume-nothing', work_dir=tmp_path):
        set_resume(cfg, True, 1)


def test_a_damaged_newest_checkpoint_is_named(cfg, tmp_path, capsys):
    (tmp_path / 'epoch_2.pth').write_bytes(b'')
    (tmp_path / 'last_checkpoint').write_text('epoch_2.pth')
    save_run(tmp_path / 'epoch_1.pth')
    set_resume(cfg, True, 1)
    assert Path(cfg.load_from).name == 'epoch_1.pth' and 'epoch_2.pth' in capsys.readouterr().out


def test_a_checkpoint_of_a_newer_version_is_refused(cfg, tmp_path):
    info = {'runtime_info': {'mmfinetune': {'version': VERSION + 1, 'batch_setup': {'of_another': 'kind'}}}}
    path = save_run(tmp_path / 'epoch_1.pth', message_hub=info)
    with refused('resume-newer-version', path=path, version=VERSION + 1, known=VERSION):
        set_resume(cfg, str(path), 1)


def test_a_file_that_is_not_of_a_run_is_refused(cfg, tmp_path):
    path = save_run(tmp_path / 'best.pth', optimizer=None, message_hub=None)
    with refused('resume-no-run', path=path) as caught:
        set_resume(cfg, str(path), 1)
    assert codes(caught.value.problems) == ['resume-missing-key'] * 2


def test_a_version_that_is_no_number_is_refused(cfg, tmp_path):
    info = {'runtime_info': {'mmfinetune': {'version': torch.zeros(3)}}}
    path = save_run(tmp_path / 'epoch_1.pth', message_hub=info)
    with refused('resume-no-run', path=path):
        set_resume(cfg, str(path), 1)


def test_a_checkpoint_with_code_is_refused(cfg, tmp_path):
    path = save_run(tmp_path / 'epoch_1.pth', meta={'config': 'import os'})
    with refused('resume-holds-code', path=path):
        set_resume(cfg, str(path), 1)


def saved_settings(cfg, folder, **changes):
    """A checkpoint whose run had other settings than `cfg`."""
    settings = {**settings_of(cfg), **changes}
    info = {'runtime_info': {'mmfinetune': {'version': VERSION, 'settings': settings}}}
    return save_run(folder / 'epoch_1.pth', message_hub=info)


MULTI_STEP = [{'type': 'MultiStepLR', 'milestones': [8]}]


@pytest.mark.parametrize('new', [False, True])
def test_a_schedule_that_has_changed(cfg, tmp_path, new):
    optimizer = {**settings_of(cfg)['optim_wrapper']['optimizer'], 'lr': 0.5}
    path = saved_settings(
        cfg,
        tmp_path,
        param_scheduler=MULTI_STEP,
        optim_wrapper={**settings_of(cfg)['optim_wrapper'], 'optimizer': optimizer},
    )
    before = settings_of(cfg)
    lines = set_schedule(cfg, set_resume(cfg, str(path), 1), new)
    assert len([line for line in lines if 'not used' in line]) == (0 if new else 2)
    if new:
        assert settings_of(cfg) == before
    else:
        assert cfg.param_scheduler[0].milestones == [8] and cfg.optim_wrapper.optimizer.lr == 0.5


def test_equal_settings_are_not_told(cfg, tmp_path):
    lines = set_schedule(cfg, set_resume(cfg, str(saved_settings(cfg, tmp_path)), 1), False)
    assert len(lines) == 1


def test_a_longer_run_is_told(cfg, tmp_path):
    path = saved_settings(cfg, tmp_path, train_cfg={'max_epochs': 2})
    lines = set_schedule(cfg, set_resume(cfg, str(path), 1), False)
    assert any('it was 2' in line for line in lines)


def test_another_optimizer_is_refused(cfg, tmp_path):
    other = {**settings_of(cfg)['optim_wrapper'], 'optimizer': {'type': 'AdamW', 'lr': 0.1}}
    path = saved_settings(cfg, tmp_path, optim_wrapper=other)
    with refused('resume-other-optimizer'):
        set_schedule(cfg, set_resume(cfg, str(path), 1), False)
