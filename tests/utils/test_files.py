"""Files: written completely or not at all, found in natural order, read with short reasons."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

from mmfinetune.utils import files
from mmfinetune.utils.files import find_files, natural_key, read_json, read_text, read_yaml
from mmfinetune.utils.images import find_images
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import faulty, refused


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_atomic_write(tmp_path):
    path = tmp_path / 'deep' / 'a.json'
    files.atomic_write_json(path, {'b': [1, 'ä'], 'a': 0.5})
    assert path.read_bytes() == b'{"b":[1,"\\u00e4"],"a":0.5}\n'
    assert files.json_bytes('ä', indent=1) == '"ä"\n'.encode()
    files.atomic_write_text(path, 'grün')
    assert path.read_bytes() == 'grün'.encode()
    files.atomic_write_bytes(path, b'\0')
    assert path.read_bytes() == b'\0'
    assert names(path.parent) == ['a.json']


def test_atomic_write_honours_the_umask_and_follows_links(tmp_path):
    mask = os.umask(0o022)
    try:
        files.atomic_write_text(tmp_path / 'a', 'a')
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / 'a').stat().st_mode) == 0o644
    (tmp_path / 'link').symlink_to(tmp_path / 'a')
    files.atomic_write_text(tmp_path / 'link', 'b')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'a').read_text() == 'b'


def test_failed_write_changes_none_of_the_files(tmp_path, monkeypatch):
    (tmp_path / 'a').write_text('old')
    (tmp_path / 'file').write_text('')
    with refused('file-not-writable', path=tmp_path / 'file/b'):
        files.atomic_write_all({tmp_path / 'a': b'new', tmp_path / 'file' / 'b': b'new'})

    def fail(handle: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', fail)
    with refused('file-not-writable', reason='No space left on device'):
        files.atomic_write_text(tmp_path / 'a', 'new')
    assert (tmp_path / 'a').read_text() == 'old'
    assert names(tmp_path) == ['a', 'file']


def test_a_read_only_disk_is_told(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    # Of such a disk not even what is missing can be removed.
    for name in ('open', 'unlink', 'mkdir'):
        monkeypatch.setattr(Path, name, refuse)
    with refused('file-not-writable', reason='Read-only file system'):
        files.atomic_write_bytes(tmp_path / 'a', b'')


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match='JSON'):
        files.atomic_write_json(tmp_path / 'a', float('nan'))
    assert names(tmp_path) == []


@pytest.mark.parametrize('indent', [None, 1])
def test_a_half_character_is_written_as_it_was_read(tmp_path, indent):
    path = tmp_path / 'a.json'
    files.atomic_write_json(path, {'a': 'ä\ud800'}, indent)
    assert read_json(path) == {'a': 'ä\ud800'}


def test_files_are_found_in_natural_order_without_hidden_ones(tmp_path):
    names = [
        'img10.jpg',
        'img2.JPG',
        'b/ünï çode 1.png',
        'b/.hidden.png',
        '.git/a.png',
        '__MACOSX/a.jpg',
        'notes.txt',
        'B/a.tiff',
        'b/img1.jpeg',
        'Thumbs.db',
        'c/01.bmp',
        'c/1.bmp',
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ['B/a.tiff', 'b/img1.jpeg', 'b/ünï çode 1.png', 'c/01.bmp', 'c/1.bmp', 'img2.JPG', 'img10.jpg']
    assert [path.name for path in find_files(tmp_path, {'.txt'})] == ['notes.txt']


def test_a_folder_is_walked_once_whatever_links_lead_to_it(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/1.png').touch()
    (tmp_path / 'a/loop').symlink_to(tmp_path)
    (tmp_path / 'self').symlink_to(tmp_path / 'self')
    elsewhere = tmp_path.with_name(tmp_path.name + '_elsewhere')
    elsewhere.mkdir()
    (elsewhere / '2.png').touch()
    (tmp_path / 'b').symlink_to(elsewhere)
    assert [path.name for path in find_images(tmp_path)] == ['1.png', '2.png']


def test_natural_keys_order_any_names():
    names = ['a', '10', '9', 'a10b2', 'a10b1', 'A2', '', '٣', '²']
    assert len({natural_key(name) for name in names}) == len(names)
    assert sorted(names, key=natural_key) == ['', '9', '10', 'a', 'A2', 'a10b1', 'a10b2', '²', '٣']


@pytest.mark.parametrize('data, text', [('ä\n'.encode(), 'ä\n'), (b'\xef\xbb\xbfx', 'x'), ('ä'.encode('utf-16'), 'ä')])
def test_text_with_marks(tmp_path, data, text):
    assert read_text(written(tmp_path / 'a.txt', data)) == text


@pytest.mark.parametrize(
    'data, facts, code',
    [
        (b'', {}, 'json-empty'),
        (b' \n', {}, 'json-empty'),
        (b'{"a": [1,', dict(line=1, column=10), 'json-syntax'),
        (b'{\n"a": x}', dict(line=2), 'json-syntax'),
        (b'\xff\x00\xfe', dict(byte=0), 'text-file-encoding'),
        (b'[' * 100_000, {}, 'json-nesting'),
        (b'[' + b'9' * 5000 + b']', {}, 'json-number'),
    ],
)
def test_bad_json_is_a_short_reason(tmp_path, data, facts, code):
    with faulty(code, **facts):
        read_json(written(tmp_path / 'a.json', data))
    with faulty('text-file-missing'):
        read_json(tmp_path / 'none.json')


def test_a_folder_is_probed_and_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    files.require_writable(tmp_path / 'new/deep')
    files.require_writable(tmp_path)
    assert names(tmp_path) == ['file']
    for place in ('file', 'file/deep'):
        with refused('file-not-writable', path=tmp_path / place):
            files.require_writable(tmp_path / place)
    # A second run may make a folder next to this one meanwhile.
    probe = tempfile.TemporaryFile

    def meanwhile(dir):
        (tmp_path / 'new/other').mkdir(parents=True)
        return probe(dir=dir)

    monkeypatch.setattr(tempfile, 'TemporaryFile', meanwhile)
    files.require_writable(tmp_path / 'new/deep')
    assert names(tmp_path / 'new') == ['other']


def laughs(levels: int, merged: bool = False) -> str:
    """Anchors that each refer ten times to the one before."""
    if merged:
        lines = [
            'a0: &a0 {x0: 1}',
            *(f'a{k}: &a{k} {{<<: [{", ".join([f"*a{k - 1}"] * 10)}]}}' for k in range(1, levels)),
        ]
    else:
        lines = ['a0: &a0 [lol]', *(f'a{k}: &a{k} [{", ".join([f"*a{k - 1}"] * 10)}]' for k in range(1, levels))]
    return '\n'.join([*lines, f'names: *a{levels - 1}'])


@pytest.mark.parametrize(
    ('text', 'code'),
    [
        (laughs(12), 'yaml-unfolds'),
        (laughs(60), 'yaml-unfolds'),
        (laughs(12, merged=True), 'yaml-unfolds'),
        ('a: &a [' + 'x, ' * 5000 + ']\nb: [' + '*a, ' * 5000 + ']', 'yaml-unfolds'),
        ('[' * 100_000, 'yaml-nesting'),
        ('names: ' + '[' * 200 + ']' * 200, 'yaml-nesting'),
        ('\n'.join(' ' * k + 'a:' for k in range(200)), 'yaml-nesting'),
        ('- ' * 5000 + 'a', 'yaml-nesting'),
        ('nc: ' + '9' * 5000, 'yaml-value'),
        ('nc: 2001-13-45', 'yaml-value'),
        ('nc: !!int cat', 'yaml-value'),
        ('nc: !!float cat', 'yaml-value'),
        ('nc: !!timestamp cat', 'yaml-value'),
        ('nc: !!python/object/apply:os.system [true]', 'yaml-syntax'),
        ('nc: *nothing', 'yaml-syntax'),
        ('nc: \x00', 'yaml-syntax'),
        ('{[a]: b}', 'yaml-syntax'),
        ('---\na: 1\n---\nb: 2', 'yaml-syntax'),
    ],
)
def test_crafted_yaml_is_a_short_reason_at_once(tmp_path, text, code):
    start = time.perf_counter()
    with faulty(code) as caught:
        read_yaml(written(tmp_path / 'a.yaml', text.encode()))
    assert time.perf_counter() - start < 5
    assert len(str(caught.value)) < 300


def test_anchors_of_ordinary_yaml_are_read(tmp_path):
    path = written(tmp_path / 'a.yaml', b'a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]')
    assert read_yaml(path) == {'a': {'x': 1}, 'b': {'x': 1, 'y': 2}, 'c': [{'x': 1}, {'x': 1}]}


def test_natural_keys_of_very_long_numbers():
    assert sorted(['2' + '0' * 9000, '1' + '0' * 9000, '007', '7', '07', '', 'a7', 'a', '9'], key=natural_key) == [
        '',
        '007',
        '07',
        '7',
        '9',
        '1' + '0' * 9000,
        '2' + '0' * 9000,
        'a',
        'a7',
    ]


@pytest.mark.parametrize('kind', STRANGE)
def test_only_regular_files_of_a_sensible_size_are_read(tmp_path, kind):
    path = strange(tmp_path / 'a', kind)
    with pytest.raises(OSError, match=str(path)):
        files.read_regular(path, files.MOST_JSON)
    with faulty('text-file-unreadable'):
        read_text(path)


def test_zeros_are_not_read_into_memory(tmp_path):
    path = tmp_path / 'a.json'
    with path.open('wb') as file:
        file.truncate(files.MOST_JSON)
    start = time.perf_counter()
    for read in (lambda: read_json(path, files.MOST_JSON), lambda: read_text(path, files.MOST_JSON)):
        with faulty('text-file-unreadable'):
            read()
    assert time.perf_counter() - start < 1


def test_a_link_to_a_file_is_a_file(tmp_path):
    written(tmp_path / 'a', b'text')
    (tmp_path / 'link').symlink_to('a')
    assert files.read_regular(tmp_path / 'link', 4) == b'text'
    with pytest.raises(OSError, match='more than the 3 that are read'):
        files.read_regular(tmp_path / 'link', 3)


def test_what_is_in_a_folder(tmp_path):
    (tmp_path / 'set/images').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'alias').symlink_to('set')
    (tmp_path / 'set/linked').symlink_to('../elsewhere')
    root = tmp_path / 'set'
    inside = ('images/a.jpg', '../set/a.jpg', '../alias/a.jpg', 'linked/a.jpg', str(root / 'a.jpg'), 'linked/../a.jpg')
    assert [name for name in inside if not files.is_within(root / name, root)] == []
    outside = ('../a.jpg', '/dev/zero', '../set2/a.jpg', '../elsewhere/a.jpg', 'images/../../a.jpg', '../a\0')
    assert [name for name in outside if files.is_within(root / name, root)] == []
    assert files.is_within(root / '../elsewhere/a.jpg', root, tmp_path / 'elsewhere')
