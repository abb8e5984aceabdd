"""Weights files are verified, found in caches and downloaded."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmfinetune.utils.files import hash_in_name
from mmfinetune.weights import find
from mmfinetune.weights.find import find_weights, locate, verify_file
from tests.builders.errors import refused

GOOD = b'any bytes will do here' * 40


SHA = hashlib.sha256(GOOD).hexdigest()


NAME = f'weights-{SHA[:8]}.pth'


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """An empty working directory and empty caches."""
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    folder = tmp_path / 'served'
    folder.mkdir()
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{httpd.server_address[1]}', folder
    httpd.shutdown()
    httpd.server_close()


def put(path: Path, data: bytes = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth', 'd4b0c5d6'),
        ('resnet50-0676ba61.pth', '0676ba61'),
        ('/a/b-12345678/resnet50_0676ba61.pt', '0676ba61'),
        (f'x-{SHA}.pth', SHA),
        ('mask_rcnn_20200205.pth', '20200205'),  # a date looks like a hash to torch hub too
        ('epoch_12.pth', None),
        ('best_coco_segm_mAP_epoch_3.pth', None),
        ('x-d4b0c5d.pth', None),
        ('x-d4b0c5dg.pth', None),
        ('x-d4b0c5d6.pth.part', None),
        ('d4b0c5d6.pth', None),
    ],
)
def test_hash_in_name(name, expected):
    assert hash_in_name(name) == expected
    assert hash_in_name(Path(name)) == expected


def test_good_file_by_its_hash(tmp_path):
    assert verify_file(put(tmp_path / NAME)) == SHA


def test_good_file_without_a_hash(tmp_path):
    assert verify_file(put(tmp_path / 'epoch_1.pth')) == SHA


@pytest.mark.parametrize(
    ('data', 'name', 'code', 'facts'),
    [
        (b'', NAME, 'weights-empty', {}),
        (b'<!DOCTYPE html><html><body>Log in', NAME, 'weights-text', {}),
        (b'\n<html lang="en">', 'a.pth', 'weights-text', {}),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'a.pth', 'weights-text', {}),
        (GOOD + b'.', NAME, 'weights-damaged', {'expected': SHA[:8]}),
        (GOOD[:-1], NAME, 'weights-damaged', {'expected': SHA[:8]}),
    ],
)
def test_bad_file(tmp_path, data, name, code, facts):
    path = put(tmp_path / name, data)
    with refused(code, path=path, **facts) as caught:
        verify_file(path)
    assert '--weights' in caught.value.hint


def test_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    path, hashed = put(tmp_path / NAME), []
    sha256_of = find.sha256_of
    monkeypatch.setattr(find, 'sha256_of', lambda path: hashed.append(path) or sha256_of(path))
    assert verify_file(path) == verify_file(path) == SHA
    assert len(hashed) == 1
    put(path, GOOD[:-1])
    with refused('weights-damaged'):
        verify_file(path)
    assert len(hashed) == 2


def test_no_file(tmp_path):
    with refused('weights-missing', path=tmp_path / 'a.pth') as caught:
        verify_file(tmp_path / 'a.pth')
    assert '--weights' in caught.value.hint


def test_folder_in_place_of_a_file(tmp_path):
    with refused('weights-directory', path=tmp_path):
        verify_file(tmp_path)


def test_own_path_is_best(home):
    mine = put(home / 'mine' / NAME)
    put(home / 'torch/hub/checkpoints' / NAME)
    assert find_weights(mine) == mine
    assert not Path('pretrain').exists()


def test_damaged_own_path_is_an_error_though_a_cache_has_it(home):
    put(Path('pretrain') / NAME, GOOD[:-1])
    put(home / 'torch/hub/checkpoints' / NAME)
    with refused('weights-damaged'):
        find_weights(Path('pretrain') / NAME)


@pytest.mark.parametrize('place', ['torch/hub/checkpoints', 'cache/mim', 'work'])
def test_found_in_a_cache_it_stays_there(home, place):
    source = put(home / place / NAME)
    assert find_weights(f'pretrain/{NAME}') == source
    assert not Path('pretrain').exists()


def test_caches_without_their_variables(home, monkeypatch):
    monkeypatch.delenv('TORCH_HOME')
    put(home / 'cache/torch/hub/checkpoints' / NAME)
    assert find_weights(f'pretrain/{NAME}').read_bytes() == GOOD
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(home / 'me'))
    assert home / 'me/.cache/torch/hub/checkpoints' in find.search_places()


def test_pretrain_comes_before_the_caches(home):
    # Another path of the same name: pretrain/ is searched by file name.
    put(Path('pretrain') / 'a.pth', b'from pretrain')
    put(home / 'torch/hub/checkpoints' / 'a.pth', b'from torch')
    put(home / 'cache/mim' / 'a.pth', b'from mim')
    assert find_weights('elsewhere/a.pth').read_bytes() == b'from pretrain'


def test_order_of_the_caches(home):
    put(home / 'torch/hub/checkpoints' / 'a.pth', b'from torch')
    put(home / 'cache/mim' / 'a.pth', b'from mim')
    put(home / 'work' / 'a.pth', b'from here')
    assert find_weights('pretrain/a.pth').read_bytes() == b'from torch'


def test_damaged_file_in_a_cache_is_passed_over(home):
    put(home / 'torch/hub/checkpoints' / NAME, GOOD[:-1])
    put(home / 'cache/mim' / NAME)
    assert find_weights(f'pretrain/{NAME}').read_bytes() == GOOD


def test_download(home, server):
    url, folder = server
    put(folder / NAME)
    found = find_weights(f'pretrain/{NAME}', f'{url}/{NAME}')
    assert found == Path('pretrain') / NAME
    assert found.read_bytes() == GOOD
    assert names_in(Path('pretrain')) == [NAME]


def test_download_is_not_repeated(home, server):
    url, folder = server
    put(folder / NAME)
    find_weights(f'pretrain/{NAME}', f'{url}/{NAME}')
    (folder / NAME).unlink()
    assert find_weights(f'pretrain/{NAME}', f'{url}/{NAME}').read_bytes() == GOOD


@pytest.mark.parametrize(
    ('data', 'code'), [(GOOD[:-1], 'download-mismatch'), (b'<html>Log in</html>', 'download-other')]
)
def test_download_of_something_else(home, server, data, code):
    url, folder = server
    put(folder / NAME, data)
    with refused(code):
        find_weights(f'pretrain/{NAME}', f'{url}/{NAME}')
    assert not (Path('pretrain') / NAME).exists()


def test_download_that_is_not_there(home, server):
    with refused('download-http', status=404):
        find_weights(f'pretrain/{NAME}', f'{server[0]}/{NAME}')


def test_nowhere_and_no_address(home):
    put(home / 'cache/mim' / NAME, GOOD[:-1])
    with refused('weights-nowhere', path=Path('pretrain') / NAME) as caught:
        find_weights(f'pretrain/{NAME}')
    *searched, damaged = caught.value.problems
    places = (Path('pretrain'), home / 'torch/hub/checkpoints', home / 'cache/mim', home / 'work')
    assert [problem.facts['path'] for problem in searched] == [place / NAME for place in places]
    assert damaged.code == 'weights-damaged'


def weights_cfg(url: str, name: str, fallback: str) -> dict:
    return {
        'checkpoint': f'pretrain/{name}',
        'url': f'{url}/{name}',
        'fallbacks': [{'checkpoint': f'pretrain/{fallback}', 'url': f'{url}/{fallback}'}],
    }


def test_the_next_source_is_taken_and_said(home, server, capsys):
    url, folder = server
    put(folder / NAME)
    found = locate(weights_cfg(url, 'gone-0123abcd.pth', NAME))
    assert found.read_bytes() == GOOD
    out = capsys.readouterr().out
    assert 'HTTP 404' in out and f'Using {found}' in out


def test_the_next_source_is_taken_for_a_damaged_file(home, server):
    url, folder = server
    put(Path('pretrain/bad-0123abcd.pth'))
    put(folder / NAME)
    assert locate(weights_cfg(url, 'bad-0123abcd.pth', NAME)) == Path('pretrain') / NAME


def test_no_source_at_all(home, server):
    with refused('weights-no-source', path='pretrain/gone-0123abcd.pth') as caught:
        locate(weights_cfg(server[0], 'gone-0123abcd.pth', 'gone-too-0123abcd.pth'))
    assert len(caught.value.problems) == 2
    assert not list(Path('pretrain').glob('*.pth'))


def test_a_url_is_fetched_and_verified(home, server):
    url, folder = server
    good = put(folder / NAME)
    assert find.fetch(f'{url}/{NAME}').read_bytes() == GOOD
    with refused('download-http'):
        find.fetch(f'{url}/none-0123abcd.pth')
    good.rename(folder / 'bad-0123abcd.pth')
    with refused('download-mismatch'):
        find.fetch(f'{url}/bad-0123abcd.pth')
    assert [p.name for p in Path('pretrain').glob('*.pth')] == [NAME]
