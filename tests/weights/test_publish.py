"""Weights written for others: stripped and named by their hash, or under another library's names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mmfinetune.weights.find import verify_file
from mmfinetune.weights.publish import convert_file, publish
from mmfinetune.weights.read import read_checkpoint
from tests.builders.errors import refused
from tests.builders.runs import drive
from tests.builders.weights import mmdet_state, same, torchvision_state


def train_checkpoint(path: Path, value: float = 1.0) -> Path:
    torch.save(
        {
            'meta': {'dataset_meta': {'classes': ['cat', 'dog']}, 'cfg': 'secret = 1', 'experiment_name': 'x'},
            'state_dict': {'module.w': torch.full((3,), value)},
            'optimizer': {'state': {0: torch.ones(1000)}},
            'message_hub': {},
        },
        path,
    )
    return path


def test_publish(tmp_path):
    source = train_checkpoint(tmp_path / 'epoch_1.pth')
    target = publish(source, tmp_path / 'out' / 'mine')
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert target == tmp_path / 'out' / f'mine-{digest[:8]}.pth'
    assert verify_file(target) == digest
    loaded = read_checkpoint(target)
    assert loaded.keys() == {'meta', 'state_dict'}
    assert loaded['meta'] == {'dataset_meta': {'classes': ('cat', 'dog')}}
    assert torch.equal(loaded['state_dict']['w'], torch.ones(3))
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert source.is_file()


def test_published_file_holds_no_more_than_its_tensors(tmp_path):
    # A view keeps its whole storage alive, and torch.save writes the storage.
    torch.save({'state_dict': {'w': torch.zeros(1_000_000)[:10]}}, tmp_path / 'a.pth')
    assert publish(tmp_path / 'a.pth', tmp_path / 'b').stat().st_size < 10_000


def test_publish_takes_the_best_of_a_work_dir(tmp_path):
    train_checkpoint(tmp_path / 'epoch_2.pth', 2.0)
    train_checkpoint(tmp_path / 'best_coco_segm_mAP_epoch_1.pth', 1.0)
    target = publish(tmp_path, tmp_path / 'out' / 'mine')
    assert torch.equal(read_checkpoint(target)['state_dict']['w'], torch.ones(3))


def test_publish_of_nothing(tmp_path):
    with refused('checkpoint-none', work_dir=tmp_path):
        publish(tmp_path, tmp_path / 'mine')
    with refused('weights-missing', path=tmp_path / 'epoch_1.pth'):
        publish(tmp_path / 'epoch_1.pth', tmp_path / 'mine')


def test_published_file_is_replaced_only_if_asked(tmp_path):
    source = train_checkpoint(tmp_path / 'epoch_1.pth')
    target = publish(source, tmp_path / 'mine')
    with refused('weights-target-exists', path=target):
        publish(source, tmp_path / 'mine')
    assert publish(source, tmp_path / 'mine', overwrite=True) == target


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize(
    ('name', 'code'),
    [
        ('there.pth', 'weights-target-exists'),
        ('folder', 'weights-target-exists'),
        ('x.pkl', 'weights-target-suffix'),
        ('x-0123abcd.pth', 'weights-target-hash'),
    ],
)
def test_targets_that_are_refused(name, code, overwrite, tmp_path):
    (tmp_path / 'there.pth').write_text('precious')
    (tmp_path / 'folder').mkdir()
    torch.save(mmdet_state(3), tmp_path / 'src.pth')
    if overwrite and name == 'there.pth':
        convert_file(tmp_path / 'src.pth', tmp_path / name, overwrite=True)
        assert 'state_dict' in read_checkpoint(tmp_path / name)
        return
    with refused(code, path=tmp_path / name):
        convert_file(tmp_path / 'src.pth', tmp_path / name, overwrite=overwrite)
    assert (tmp_path / 'there.pth').read_text() == 'precious'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'src.pth', 'there.pth']


def test_own_80_classes_get_no_holes(tmp_path):
    names = tuple(f'class {i}' for i in range(80))
    torch.save({'meta': {'dataset_meta': {'classes': names}}, 'state_dict': mmdet_state()}, tmp_path / 'own.pth')
    convert_file(tmp_path / 'own.pth', tmp_path / 'tv.pth', 'torchvision')
    state = torch.load(tmp_path / 'tv.pth', weights_only=True)
    assert len(state['roi_heads.box_predictor.cls_score.bias']) == 81


def test_tool(tmp_path, monkeypatch):
    state = torchvision_state(91)
    torch.save(state, tmp_path / 'tv.pth')
    monkeypatch.chdir(tmp_path)
    done = drive('convert_weights', 'tv.pth', 'ours.pth', '--bn-eps', '0')
    assert done.code == 0, done.err
    for expected in ('torchvision', '80 classes (person, bicycle, car, …', 'pytorch', 'RGB, mean (123.675', 'eps 0'):
        assert expected in ' '.join(done.out.split())
    assert done.out.splitlines()[-1] == 'Written: ours.pth'
    again = drive('convert_weights', 'tv.pth', 'ours.pth')
    assert (again.code, again.error) == (2, 'weights-target-exists')
    assert drive('convert_weights', 'tv.pth', 'ours.pth', '--bn-eps', '0', '--overwrite').code == 0
    back = drive('convert_weights', 'ours.pth', 'back.pth', '--to', 'torchvision')
    assert back.code == 0, back.err
    assert 'overwrite_eps(model, 0)' in back.out
    same(torch.load(tmp_path / 'back.pth', weights_only=True), state)
