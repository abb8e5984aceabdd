"""What a pickle would make is counted before it is read; little files that ask for much are refused at once."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfinetune.weights import pickles, read
from mmfinetune.weights.publish import publish
from mmfinetune.weights.sources import open_source
from tests.builders.errors import refused
from tests.builders.weights import mmdet_state

HEAD = b'\x80\x02'
ONES = torch.ones(1 << 20)


def text(value: str) -> bytes:
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def doubled(levels: int) -> bytes:
    """A tuple of two of the same, and so on: hashing it takes twice as long with each level."""
    return b')' + b'2\x86' * levels


# Each would take hours or hundreds of gigabytes.
BOMBS = {
    'key': HEAD + b'}' + doubled(60) + b'Ns.',
    'key through the memo': HEAD + b'})q\x00' + b''.join(b'h%ch%c\x86q%c' % (k, k, k + 1) for k in range(60)) + b'Ns.',
    'key after a mark that is taken back': HEAD + b'}(0' + doubled(60) + b'Ns.',
    'set': b'\x80\x04}' + text('a') + b'\x8f(' + doubled(60) + b'\x90s.',
    'frozen set': b'\x80\x04}' + text('a') + b'(' + doubled(60) + b'\x91s.',
    'classes': HEAD + b'}' + text('classes') + b'](' + b']q\x00' + b'](h\x00h\x00eq\x00' * 60 + b'es.',
    'text written as bytes': HEAD
    + b'c_codecs\nencode\nq\x00'
    + text('a' * 1_000_000)
    + b'q\x01'
    + text('latin1')
    + b'\x86q\x020]('
    + b'h\x00h\x02R' * 100_000
    + b'e.',
    'a list copied': b'\x80\x02ccollections\nOrderedDict\nq\x00]q\x01('
    + b''.join(b'](K\x01K\x02e' for _ in range(10_000))
    + b'e\x85q\x020]('
    + b'h\x00h\x02R' * 10_000
    + b'e.',
}


def zipped(content: bytes, path: Path) -> Path:
    """A torch file with another pickle in it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, 'w') as new:
        for member in old.infolist():
            new.writestr(member, content if member.filename.endswith('data.pkl') else old.read(member))
    return path


@pytest.mark.parametrize('content', BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_at_once(content, tmp_path):
    (tmp_path / 'a.pkl').write_bytes(content)
    legacy = b''.join(pickle.dumps(part, 2) for part in (int.from_bytes(pickles.TORCH_MAGIC[4:-1], 'little'), 1001, {}))
    assert legacy.startswith(pickles.TORCH_MAGIC)
    (tmp_path / 'b.pth').write_bytes(legacy + content)
    start = time.perf_counter()
    for path in (tmp_path / 'a.pkl', tmp_path / 'b.pth', zipped(content, tmp_path / 'c.pth')):
        with refused('weights-memory', path=path):
            open_source(path)
    assert time.perf_counter() - start < 20


def test_packed_zeros_are_refused(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'w': torch.zeros(1 << 25)}}, path)
    packed = tmp_path / 'packed.pth'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert packed.stat().st_size < 1 << 20
    with refused('weights-memory', path=packed):
        open_source(packed)
    assert read.read_checkpoint(path)['state_dict']['w'].shape == (1 << 25,)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('where', ['state_dict', 'optimizer'])
@pytest.mark.parametrize(
    'tensors',
    [
        [torch.ones(1).expand(1 << 36)],
        [torch.ones(1, dtype=torch.float16).expand(2, 1 << 33)],
        [torch.ones(1 << 16).as_strided((1 << 16, 1 << 16), (0, 1))],
        [ONES[k:] for k in range(1000)],
    ],
    ids=['expanded', 'half', 'strided', 'shared'],
)
def test_tensors_larger_than_their_file_are_refused(tensors, where, legacy, tmp_path):
    path = tmp_path / 'a.pth'
    parts = {f'x{k}': t for k, t in enumerate(tensors)}
    torch.save({'state_dict': mmdet_state(3), where: parts}, path, _use_new_zipfile_serialization=not legacy)
    for use in (open_source, lambda p: publish(p, tmp_path / 'out'), read.read_checkpoint):
        with refused('weights-memory', path=path):
            use(path)
    assert list(tmp_path.iterdir()) == [path]


def test_tied_and_half_weights_are_no_bomb(tmp_path):
    tied = torch.ones(1 << 22, dtype=torch.float16)
    torch.save({'state_dict': {'a': tied, 'b': tied[1:], 'c': tied}}, tmp_path / 'a.pth')
    assert len(read.read_checkpoint(tmp_path / 'a.pth')['state_dict']) == 3


def test_counting_costs_little(tmp_path):
    path = tmp_path / 'a.pkl'
    path.write_bytes(pickle.dumps({'model': {f'w{k}': np.ones(1 << 16, 'f4') for k in range(300)}}, 2))
    start = time.perf_counter()
    pickles.require_bounded(path)
    assert time.perf_counter() - start < 2
