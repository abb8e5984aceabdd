"""The files of a run: complete or not there, room for them, and which go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mmengine.fileio import get_file_backend

from mmfinetune.engine.checkpoints import Checkpoints
from mmfinetune.utils.errors import UserError
from tests.builders.disk import nearly_full
from tests.builders.errors import refused


def checkpoints(folder: Path, keep: int = 2, **changes) -> Checkpoints:
    return Checkpoints(folder, 'epoch_{}.pth', keep, **changes)


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    backend = get_file_backend(backend_args=dict(backend='atomic'))
    backend.put(b'old', tmp_path / 'a.pth')

    def full(number: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError):
        backend.put(b'new', tmp_path / 'a.pth')
    assert (tmp_path / 'a.pth').read_bytes() == b'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.pth']


def test_file_for_which_there_is_no_room_is_not_begun(tmp_path):
    backend = get_file_backend(backend_args=dict(backend='atomic'))
    with nearly_full(2), refused('checkpoint-no-room', path=tmp_path / 'a.pth'):
        backend.put(b'new', tmp_path / 'a.pth')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('keep', 'kept', 'number', 'expected'),
    [
        (2, [], 1, ([1], [])),
        (2, [1], 2, ([1, 2], [])),
        (2, [1, 2], 3, ([2, 3], ['epoch_1.pth'])),
        (2, [2, 3], 3, ([2, 3], [])),  # saved again, once it is validated
        (1, [1, 2, 3], 4, ([4], ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'])),  # fewer than before the resume
        (-1, [1, 2], 3, ([], [])),
    ],
)
def test_which_files_go(tmp_path, keep, kept, number, expected):
    assert checkpoints(tmp_path, keep).prune(kept, number) == expected


def test_old_files_stay_where_the_new_one_cannot_be_written(tmp_path):
    (tmp_path / 'epoch_1.pth').touch()

    def fail() -> None:
        raise OSError(5, 'Input/output error')

    with refused('checkpoint-not-saved', path=tmp_path / 'epoch_2.pth'):
        checkpoints(tmp_path).save('epoch_2.pth', fail, ['epoch_1.pth'])
    assert (tmp_path / 'epoch_1.pth').exists()


def test_a_file_does_not_replace_itself_and_some_may_be_gone(tmp_path):
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (tmp_path / name).touch()
    replaces = ['epoch_1.pth', 'epoch_2.pth', 'gone.pth']
    checkpoints(tmp_path).save('epoch_2.pth', lambda: None, replaces)
    assert [p.name for p in tmp_path.iterdir()] == ['epoch_2.pth']


def test_only_the_first_process_removes_and_points(tmp_path):
    (tmp_path / 'epoch_1.pth').touch()
    other = checkpoints(tmp_path, writes=False)
    other.save('epoch_2.pth', lambda: None, ['epoch_1.pth'])
    other.point_to('epoch_2.pth', tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['epoch_1.pth']


def test_room_counts_what_will_be_replaced(tmp_path):
    (tmp_path / 'epoch_9.pth').write_bytes(bytes(400))
    with nearly_full(1000):
        checkpoints(tmp_path, 1).require_room(5, full=500, extra=400)
        with refused('checkpoint-no-room-for-run', files=2):
            checkpoints(tmp_path, 1).require_room(5, full=500, extra=401)
