"""Where a prepared folder keeps its files, and where images are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfinetune.data.layout import Prepared, find_source, find_splits, guess_image_root
from tests.builders.errors import refused


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_which_file_of_a_folder_is_meant(tmp_path):
    with refused('layout-no-source', folder=tmp_path):
        find_source(tmp_path)
    one = touch(tmp_path / 'annotations/labels.json')
    assert find_source(tmp_path) == find_source(one) == one
    more = touch(tmp_path / 'annotations/more.json')
    with refused('layout-several-sources') as caught:
        find_source(tmp_path)
    assert caught.value.problems == [one, more]
    whole = touch(Prepared(tmp_path).annotation('all'))
    assert find_source(tmp_path) == find_source(whole.parent) == whole


def test_splits_for_a_config(tmp_path):
    data = Prepared(tmp_path)
    with refused('layout-splits', root=tmp_path) as caught:
        data.splits()
    assert caught.value.problems == [data.annotation('train'), data.annotation('val')]
    touch(data.annotation('all'))
    with refused('layout-splits') as caught:
        data.splits()
    assert f'split_dataset.py {tmp_path}' in caught.value.hint
    files = {split: touch(data.annotation(split)) for split in ('val', 'train')}
    assert data.splits() == files
    assert list(data.splits()) == ['train', 'val']


def test_splits_from_the_command_line(tmp_path):
    with refused('layout-no-files', folder=tmp_path):
        find_splits([tmp_path])
    with refused('layout-no-images', images=tmp_path / 'gone'):
        find_splits([tmp_path], tmp_path / 'gone')
    train, val, _ = (touch(Prepared(tmp_path).annotation(split)) for split in ('train', 'val', 'all'))
    assert find_splits([tmp_path]) == {'train': (train, None), 'val': (val, None)}
    other = touch(tmp_path / 'other/val.json')
    assert list(find_splits([other, val, train, train], tmp_path)) == ['train', 'val', 'annotations/val']


@pytest.mark.parametrize('folder', ['images', '.', 'train', 'images/train', 'annotations'])
def test_image_folder_near_a_file(tmp_path, folder):
    path = touch(Prepared(tmp_path).annotation('train'))
    names = ['a.jpg', None, 'b.jpg']
    assert guess_image_root(path, names) == tmp_path / 'images'
    for name in ('a.jpg', 'b.jpg'):
        touch(tmp_path / folder / name)
    assert guess_image_root(path, names) == tmp_path / folder


@pytest.mark.parametrize('prefix', ['images/', '', 'photos/'])
def test_image_prefix_of_a_folder(tmp_path, prefix):
    touch(Prepared(tmp_path).annotation('train'))
    assert Prepared(tmp_path).image_prefix(['a.jpg']) == ''
    touch(tmp_path / prefix / 'a.jpg')
    assert Prepared(tmp_path).image_prefix(['a.jpg']) == prefix
