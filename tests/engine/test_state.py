"""The state of a run, and that of checkpoints from before it had a version."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from mmfinetune.engine.state import RunState, upgrade
from mmfinetune.weights.read import read_checkpoint
from tests.builders.errors import refused
from tests.builders.toy import assert_same_checkpoint, make_cfg, names, stop, train

SETTINGS = {
    'one metric': dict(accumulate=2),
    'two metrics': dict(
        checkpoint=dict(save_best=['score', 'score2'], greater_keys=['score', 'score2'], rule=None),
        val_evaluator=dict(type='ToyMetric', names=['score', 'score2']),
    ),
    'first metric': dict(checkpoint=dict(save_best='auto')),
    'early stop': dict(hooks=[dict(type='EarlyStopHook', monitor='score', patience=2)], train_cfg=dict(max_epochs=9)),
}


@pytest.fixture
def state_of(tmp_path):
    """Runs until a step and gives the checkpoint's state."""

    def make(step: int, **changes) -> RunState:
        path = stop(make_cfg(tmp_path, **changes), step).checkpoint
        return RunState(**read_checkpoint(path)['message_hub']['runtime_info']['mmfinetune'])

    return make


def make_old(path: Path) -> None:
    """Rewrite a checkpoint as the toolkit wrote it before run states had a version."""
    loaded = read_checkpoint(path)
    hub = loaded['message_hub']
    state = RunState(**hub['runtime_info'].pop('mmfinetune'))
    del hub['resumed_keys']['mmfinetune']
    single = len(state.best) == 1
    old = {
        'epoch_start': state.epoch_start,
        'results_epoch_start': state.epoch_start,
        'last_ckpt': str(path.parent / state.last),
        'keep_ckpt_ids': state.kept,
        **({'validated_epoch': state.validated_epoch} if state.validated_epoch else {}),
        **({'early_stop': [state.early_stop['best'], state.early_stop['waited']]} if state.early_stop else {}),
    }
    for metric, best in state.best.items():
        suffix = '' if single else f'_{metric}'
        old |= {f'best_score{suffix}': best['score'], f'best_ckpt{suffix}': str(path.parent / best['file'])}
    hub['runtime_info'].update(old)
    hub['resumed_keys'].update(dict.fromkeys(old, True))
    loaded['meta']['recipe'] = state.batch_setup
    if state.outdated:
        loaded['outdated'] = state.outdated
    loaded.update(loaded.pop('mmfinetune', {}))
    torch.save(loaded, path)


@pytest.mark.parametrize(('settings', 'step'), [('one metric', 1), *((name, 13) for name in SETTINGS)])
def test_a_checkpoint_of_the_old_layout_resumes_exactly(tmp_path, settings, step):
    changes = SETTINGS[settings]
    train(make_cfg(tmp_path / 'whole', **changes))
    path = stop(make_cfg(tmp_path / 'old', **changes), step).checkpoint
    make_old(path)
    train(make_cfg(tmp_path / 'old', **changes), resume=True)
    assert names(tmp_path / 'old') == names(tmp_path / 'whole')
    for name in names(tmp_path / 'whole'):
        assert_same_checkpoint(tmp_path / 'whole' / name, tmp_path / 'old' / name)


def test_the_gradients_of_an_old_checkpoint_are_those_of_the_new(tmp_path):
    path = stop(make_cfg(tmp_path, accumulate=2), 10).checkpoint
    new = read_checkpoint(path)
    make_old(path)
    old = read_checkpoint(path)
    assert 'gradients' in old and 'mmfinetune' not in old
    upgrade(old)
    assert old['mmfinetune']['gradients'].keys() == new['mmfinetune']['gradients'].keys()
    assert old['message_hub']['runtime_info'].keys() == new['message_hub']['runtime_info'].keys()
    assert dict(old['message_hub']['resumed_keys']) == dict(new['message_hub']['resumed_keys'])


def test_files_that_a_killed_save_left_are_removed_later(tmp_path):
    path = stop(make_cfg(tmp_path), 11).checkpoint
    make_old(path)
    loaded = read_checkpoint(path)
    torch.save({**loaded, 'outdated': ['epoch_0.pth']}, path)
    shutil.copy(path, tmp_path / 'epoch_0.pth')
    train(make_cfg(tmp_path), resume=path)
    assert 'epoch_0.pth' not in names(tmp_path)


def test_a_newer_version_is_refused_by_the_run_itself(tmp_path):
    path = stop(make_cfg(tmp_path), 6).checkpoint
    loaded = read_checkpoint(path)
    loaded['message_hub']['runtime_info']['mmfinetune'] = {'version': 9}
    torch.save(loaded, path)
    with refused('resume-newer-version', version=9):
        train(make_cfg(tmp_path), resume=path)


def test_the_state_is_plain_data(state_of):
    state = state_of(13, **SETTINGS['early stop'])
    assert RunState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state
    assert (state.epoch_start, state.validated_epoch, state.last) == ({'epoch': 2, 'iter': 10}, 2, 'iter_14.pth')
    assert state.early_stop == {'best': 0.3, 'waited': 0}
