"""Whatever MMEngine and MMDetection read goes through readers that run nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import mmengine
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModule, PretrainedInit
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn

from mmfinetune.utils.errors import UserError
from mmfinetune.weights import data_only, find
from tests.builders.errors import refused
from tests.builders.weights import Evil

URL = 'https://download.openmmlab.com/some/weights-d4b0c5d6.pth'


@pytest.fixture(autouse=True)
def installed() -> None:
    data_only.install()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What the code in a bad file makes."""
    return tmp_path / 'trace'


@pytest.fixture
def bad(tmp_path: Path, trace: Path) -> Path:
    """A checkpoint that MMEngine's own reader would run."""
    path = tmp_path / 'bad.pth'
    torch.save({'state_dict': {'0.weight': torch.ones(1, 1)}, 'x': Evil(os.mkdir, str(trace))}, path)
    return path


def test_all_of_mmengines_loaders_are_replaced():
    assert set(CheckpointLoader._schemes) == set(data_only.SCHEMES)
    assert set(CheckpointLoader._schemes.values()) == {data_only.load_from_data_only}


@pytest.mark.parametrize(
    'load',
    [
        CheckpointLoader.load_checkpoint,
        lambda path: load_checkpoint(nn.Linear(1, 1), path),
        lambda path: PretrainedInit(path)(nn.Linear(1, 1)),
        lambda path: PretrainedInit(path, prefix='0')(nn.Linear(1, 1)),
        lambda path: BaseModule(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights(),
    ],
    ids=['loader', 'model', 'initializer', 'part', 'init_cfg'],
)
def test_code_in_a_checkpoint_does_not_run(bad, trace, load):
    with refused('weights-code', culprit='posix.mkdir'):
        load(str(bad))
    assert not trace.exists()


def test_config_in_a_checkpoint_is_left_out(tmp_path):
    # Runner.resume runs it.
    torch.save({'meta': {'config': 'import this', 'epoch': 1}, 'state_dict': {}}, tmp_path / 'a.pth')
    assert CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))['meta'] == {'epoch': 1}


@pytest.mark.parametrize('suffix', ['pkl', 'pickle'])
def test_pickles_are_refused(tmp_path, trace, suffix):
    path = tmp_path / f'proposals.{suffix}'
    path.write_bytes(pickle.dumps(Evil(os.mkdir, str(trace))))
    with refused('pickle-refused'):
        mmengine.load(str(path))
    with path.open('rb') as file, refused('pickle-refused'):
        mmengine.load(file, file_format=suffix)
    assert not trace.exists()


@pytest.mark.parametrize('suffix', ['yaml', 'yml'])
def test_yaml_is_data(tmp_path, trace, suffix):
    path = tmp_path / f'a.{suffix}'
    path.write_text('a: [1, x]')
    assert mmengine.load(str(path)) == {'a': [1, 'x']}
    path.write_text(f'a: !!python/object/apply:os.mkdir [{str(trace)!r}]')
    for read in (mmengine.load, Config.fromfile):
        with pytest.raises(Exception, match='could not determine a constructor'):
            read(str(path))
    assert not trace.exists()


def test_pickles_and_yaml_are_still_written(tmp_path):
    mmengine.dump([1], str(tmp_path / 'a.pkl'))
    mmengine.dump([1], str(tmp_path / 'a.yaml'))
    assert pickle.loads((tmp_path / 'a.pkl').read_bytes()) == mmengine.load(str(tmp_path / 'a.yaml')) == [1]


@pytest.mark.parametrize(
    ('name', 'file', 'host'),
    [
        (URL, 'pretrain/weights-d4b0c5d6.pth', 'download.openmmlab.com'),
        (f'{URL}?download=1', 'pretrain/weights-d4b0c5d6.pth', 'download.openmmlab.com'),
        ('torchvision://resnet50', 'pretrain/resnet50-0676ba61.pth', 'download.pytorch.org'),
        ('open-mmlab://detectron2/resnet50_caffe', 'pretrain/resnet50_msra-5891d200.pth', 'mmassets.onedl.ai'),
    ],
)
def test_addresses_of_mmengine(name, file, host):
    found, url = data_only.address(name)
    assert (found, host in url) == (file, True)
    assert data_only.address('~/a.pth') == (str(Path.home() / 'a.pth'), None)


@pytest.mark.parametrize('name', ['s3://a/b.pth', 'pavi://a', 'torchvision://resnet5', 'mmcls://none', 'ftp://a/b.pth'])
def test_addresses_that_nothing_is_read_from(name):
    with refused('weights-address', address=name):
        CheckpointLoader.load_checkpoint(name)


def test_a_download_is_read_as_data_too(bad, trace, monkeypatch):
    monkeypatch.setattr(find, 'find_weights', lambda file, url: bad)
    for name in (URL, 'torchvision://resnet50'):
        with refused('weights-code'):
            CheckpointLoader.load_checkpoint(name)
    assert not trace.exists()


def test_a_classifier_becomes_a_backbone(tmp_path, monkeypatch):
    file = tmp_path / 'a.pth'
    torch.save({'state_dict': {'backbone.conv1.weight': torch.ones(1), 'head.fc.bias': torch.ones(1)}}, file)
    monkeypatch.setattr(find, 'find_weights', lambda *_: file)
    monkeypatch.setattr(data_only, 'address', lambda name: ('a.pth', URL))
    assert list(CheckpointLoader.load_checkpoint('mmcls://any')['state_dict']) == ['conv1.weight']


def test_a_missing_file_is_a_message(tmp_path):
    with pytest.raises(UserError):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'none.pth'))
