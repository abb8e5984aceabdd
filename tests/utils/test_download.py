from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmfinetune.utils import download
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import sha256_of
from tests.builders.errors import refused

DATA = bytes(range(256)) * 4000  # 1,024,000 bytes
# Without the time, which would make each collection of the tests another.
PACKED = gzip.compress(DATA, mtime=0)
MD5 = hashlib.md5(DATA).hexdigest()
SHA = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `body` at any path and notes each request's Range header."""

    daemon_threads = True

    def __init__(self) -> None:
        self.body = DATA
        self.ranges = True  # whether Range is honoured
        self.cuts: list[int] = []  # bytes after which the next answers break off
        self.errors: list[int] = []  # status codes of the next answers
        self.tag = '"v1"'
        self.seen: list[str | None] = []
        super().__init__(('127.0.0.1', 0), Handler)

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}/model.bin'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get('Range')
        server.seen.append(wanted)
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        start, condition = 0, self.headers.get('If-Range')
        if wanted and server.ranges and condition in (None, server.tag):
            start = int(wanted.removeprefix('bytes=').rstrip('-'))
            if start >= len(server.body):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(server.body)}')
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(server.body) - 1}/{len(server.body)}')
        else:
            self.send_response(200)
        self.send_header('ETag', server.tag)
        self.send_header('Content-Length', str(len(server.body) - start))
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else None
        self.wfile.write(server.body[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: Server, dst: Path, **options) -> Path:
    return download.download(server.url, dst, **{'progress': False, 'wait': 0, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_full_download(server, tmp_path):
    dst = fetch(server, tmp_path / 'deep' / 'model.bin', sha256=SHA, md5=MD5, size=len(DATA))
    assert dst.read_bytes() == DATA
    assert names(dst.parent) == ['model.bin']
    assert sha256_of(dst) == SHA


def test_good_file_is_not_fetched_again(server, tmp_path):
    dst = tmp_path / 'model.bin'
    dst.write_bytes(DATA)
    assert fetch(server, dst, sha256=SHA[:8]) == dst
    assert server.seen == []


def test_bad_file_is_replaced_by_a_good_one(server, tmp_path):
    dst = tmp_path / 'model.bin'
    dst.write_bytes(b'half')
    fetch(server, dst, md5=MD5)
    assert dst.read_bytes() == DATA


def test_cut_download_is_resumed_within_one_call(server, tmp_path):
    server.cuts = [300_000, 200_000]
    dst = fetch(server, tmp_path / 'model.bin', sha256=SHA[:12])
    assert dst.read_bytes() == DATA
    assert server.seen == [None, 'bytes=300000-', 'bytes=500000-']


def test_a_try_that_brings_more_resets_the_count(server, tmp_path):
    server.cuts = [100_000] * 8
    assert fetch(server, tmp_path / 'model.bin', sha256=SHA, retries=1).read_bytes() == DATA


@pytest.mark.parametrize('check', [{'md5': MD5}, {}])
def test_cut_download_is_resumed_by_the_next_call(server, tmp_path, check):
    dst = tmp_path / 'model.bin'
    server.cuts = [300_000]
    with refused('download-failed', kept=300_000):
        fetch(server, dst, retries=0, **check)
    assert not dst.exists()
    fetch(server, dst, **check)
    assert dst.read_bytes() == DATA
    assert server.seen[-1] == 'bytes=300000-'
    assert names(tmp_path) == ['model.bin']


def test_without_a_checksum_a_changed_file_starts_again(server, tmp_path):
    server.cuts = [300_000]
    with refused('download-failed'):
        fetch(server, tmp_path / 'model.bin', retries=0)
    server.body, server.tag = DATA[::-1], '"v2"'
    assert fetch(server, tmp_path / 'model.bin').read_bytes() == DATA[::-1]


def test_part_of_unknown_origin_is_kept_only_with_a_checksum(server, tmp_path):
    part = tmp_path / 'model.bin.part'
    part.write_bytes(DATA[:1000])
    assert fetch(server, tmp_path / 'model.bin').read_bytes() == DATA
    assert server.seen == [None]
    part.write_bytes(DATA[:1000])
    (tmp_path / 'model.bin').unlink()
    assert fetch(server, tmp_path / 'model.bin', md5=MD5).read_bytes() == DATA
    assert server.seen == [None, 'bytes=1000-']


def test_server_that_ignores_range(server, tmp_path):
    server.ranges, server.cuts = False, [300_000]
    assert fetch(server, tmp_path / 'model.bin', sha256=SHA).read_bytes() == DATA
    assert server.seen == [None, 'bytes=300000-']


def test_server_that_ignores_range_and_always_breaks_off(server, tmp_path):
    server.ranges, server.cuts = False, [300_000] * 20
    with refused('download-failed', kept=300_000) as caught:
        fetch(server, tmp_path / 'model.bin', sha256=SHA)
    assert 'connection closed after 300,000 of 1,024,000' in str(caught.value.facts['reason'])
    assert len(server.seen) < 8


def test_whole_part_is_taken_after_416(server, tmp_path):
    (tmp_path / 'model.bin.part').write_bytes(DATA)
    assert fetch(server, tmp_path / 'model.bin', sha256=SHA).read_bytes() == DATA
    assert server.seen == [f'bytes={len(DATA)}-']


def test_whole_part_of_known_size_needs_no_network(server, tmp_path):
    (tmp_path / 'model.bin.part').write_bytes(DATA)
    fetch(server, tmp_path / 'model.bin', sha256=SHA, size=len(DATA))
    assert server.seen == []


def test_too_long_part_starts_again(server, tmp_path):
    (tmp_path / 'model.bin.part').write_bytes(DATA + b'more')
    assert fetch(server, tmp_path / 'model.bin', sha256=SHA).read_bytes() == DATA
    assert server.seen[-1] is None


@pytest.mark.parametrize('kind', ['sha256', 'md5'])
def test_wrong_checksum(server, tmp_path, kind):
    dst = tmp_path / 'model.bin'
    dst.write_bytes(b'older, but mine')
    with refused('download-mismatch', url=server.url, dst=dst) as caught:
        fetch(server, dst, **{kind: '0123456789abcdef'})
    assert [(m.code, m.facts) for m in caught.value.problems] == [
        ('file-digest', dict(kind=kind, digest='0123456789abcdef', found=SHA if kind == 'sha256' else MD5))
    ]
    assert server.url in caught.value.hint and str(dst) in caught.value.hint
    assert dst.read_bytes() == b'older, but mine'
    assert names(tmp_path) == ['model.bin']


def test_login_page_is_recognised(server, tmp_path):
    server.body = b'<!DOCTYPE html><html>Please log in</html>'
    with refused('download-other') as caught:
        fetch(server, tmp_path / 'model.bin', sha256=SHA)
    assert 'web page' in caught.value.facts['found']
    assert names(tmp_path) == []


def test_login_page_does_not_cost_the_part(server, tmp_path):
    part = tmp_path / 'model.bin.part'
    part.write_bytes(DATA[:1000])
    server.body, server.ranges = b'<html>Please log in</html>', False
    with refused('download-size', size=len(DATA), offered=26):
        fetch(server, tmp_path / 'model.bin', sha256=SHA, size=len(DATA))
    assert part.read_bytes() == DATA[:1000]


def test_missing_address(server, tmp_path):
    server.errors = [404]
    with refused('download-http', status=404, dst=tmp_path / 'model.bin'):
        fetch(server, tmp_path / 'model.bin')
    assert len(server.seen) == 1


def test_busy_server_is_asked_again(server, tmp_path):
    server.errors = [503, 500]
    assert fetch(server, tmp_path / 'model.bin').read_bytes() == DATA
    server.errors = [503] * 9
    with refused('download-failed') as caught:
        fetch(server, tmp_path / 'other.bin')
    assert '503' in str(caught.value.facts['reason'])


def test_connection_refused(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{free.getsockname()[1]}/model.bin'
    with refused('download-failed', kept=0, dst=tmp_path / 'model.bin') as caught:
        download.download(url, tmp_path / 'model.bin', progress=False, wait=0)
    assert 'refused' in str(caught.value.facts['reason']).lower()


def test_silent_server_times_out(tmp_path):
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        listening.listen()
        url = f'http://127.0.0.1:{listening.getsockname()[1]}/model.bin'
        with refused('download-failed') as caught:
            download.download(url, tmp_path / 'm', timeout=0.1, retries=1, progress=False, wait=0)
    assert 'timed out' in str(caught.value.facts['reason'])


def test_other_schemes_are_refused(tmp_path):
    with refused('download-address'):
        download.download('file:///etc/passwd', tmp_path / 'model.bin')


def test_full_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 1000}))
    with refused('disk-full', free=1e-6):
        fetch(server, tmp_path / 'model.bin')


@contextlib.contextmanager
def answering(*answers: bytes, endless: bytes = b'') -> Iterator[str]:
    """A server that gives these answers, one a connection and the last again and again, and then closes it."""
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        listening.listen()
        left = list(answers)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1 << 16)
                        connection.sendall(left.pop(0) if len(left) > 1 else left[0])
                        while endless:
                            connection.sendall(endless)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f'http://127.0.0.1:{listening.getsockname()[1]}/model.pth'
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def head(*lines: str, status: str = '200 OK') -> bytes:
    return '\r\n'.join([f'HTTP/1.1 {status}', *lines, '', '']).encode()


CHUNK = b'8000\r\n' + bytes(0x8000) + b'\r\n'


@pytest.mark.parametrize('known', [dict(sha256=SHA), dict(md5=MD5), {}])
def test_more_than_the_known_size_is_not_taken(known, tmp_path):
    start = time.perf_counter()
    for headers in (['Transfer-Encoding: chunked'], ['Connection: close']):
        with answering(head(*headers), endless=CHUNK) as url, refused('download-endless', most=len(DATA)) as caught:
            download.download(url, tmp_path / 'm', size=len(DATA), progress=False, wait=0, **known)
        assert url in caught.value.hint
    assert names(tmp_path) == []
    assert time.perf_counter() - start < 10


def test_an_endless_answer_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(download, '_MOST', 1 << 20)
    with answering(head('Transfer-Encoding: chunked'), endless=CHUNK) as url, refused('download-endless', most=1 << 20):
        download.download(url, tmp_path / 'm', sha256=SHA, progress=False, wait=0)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    'target',
    ['ftp://127.0.0.1/model.pth', 'file:///etc/passwd', 'http://[::1', 'data:,x', 'http://a b/', '//', 'http://'],
)
def test_redirects_to_other_schemes_and_to_no_address(target, tmp_path):
    answer = head(f'Location: {target}', 'Content-Length: 0', status='302 Found')
    with answering(answer) as url, pytest.raises(UserError) as caught:
        download.download(url, tmp_path / 'm', progress=False, wait=0, retries=1)
    assert caught.value.code in ('download-redirect', 'download-http', 'download-failed')
    assert caught.value.code == 'download-redirect' or not target.startswith('ftp')
    assert names(tmp_path) == []


def test_redirects_from_https_to_http_are_refused_and_the_other_way_allowed():
    def redirected(here: str, there: str):
        request = download.urllib.request.Request(here)
        return download._SameScheme().redirect_request(request, io.BytesIO(), 302, 'Found', {}, there)

    for here, there in (('https://a/x', 'http://a/x'), ('https://a/x', 'ftp://a/x'), ('http://a/x', 'ftp://a/x')):
        with refused('download-redirect', url=here, target=there):
            redirected(here, there)
    for here, there in (('http://a/x', 'https://b/x'), ('http://a/x', 'http://b/y'), ('https://a/x', 'https://b/y')):
        assert redirected(here, there).full_url == there


def test_the_body_of_a_redirect_is_not_read(server, tmp_path):
    moved = head(f'Location: {server.url}', 'Connection: close', status='302 Found')
    with answering(moved, endless=bytes(1 << 16)) as url:
        path = download.download(url, tmp_path / 'm', sha256=SHA, progress=False, wait=0, retries=0)
    assert path.read_bytes() == DATA


def test_redirects_in_a_circle_end(tmp_path):
    answer = head('Location: /model.pth', 'Content-Length: 0', status='302 Found')
    with answering(answer) as url, refused('download-http', status=302):
        download.download(url, tmp_path / 'm', progress=False, wait=0)


@pytest.mark.parametrize(
    'url',
    [
        'http://[::1',
        'http://[::1/a.pth',
        'https://[::1',
        'http://',
        'http:///a.pth',
        'https:',
        'http://host:port/a.pth',
        'http://host:99999/a.pth',
        'http://a b/a.pth',
        'http://a..b/a.pth',
        f'http://{"a" * 70}.de/a.pth',
        'http://host/a\n.pth',
        'http://host/a\0.pth',
        'http://host/\ud800.pth',
        'http://\ud800/a.pth',
        'ftp://host/a.pth',
        '',
        'a.pth',
    ],
)
def test_what_is_no_address(url, tmp_path):
    start = time.perf_counter()
    with refused('download-address', url=url):
        download.download(url, tmp_path / 'm')
    assert time.perf_counter() - start < 1


def test_letters_beyond_ascii_are_sent_as_browsers_send_them(server, tmp_path):
    url = server.url.replace('model.bin', 'größe%20a.pth?x=ü#part')
    assert download.download(url, tmp_path / 'm', sha256=SHA, progress=False, wait=0).read_bytes() == DATA


PAGE = b'<!DOCTYPE html><html>Please log in</html>'


@pytest.mark.parametrize(
    ('answer', 'code'),
    [
        (head('Content-Type: text/html', 'Content-Length: 9') + b'\x80\x02}X\0\0\0\0.', 'download-other'),
        (head(f'Content-Length: {len(PAGE)}') + PAGE, 'download-other'),
        (head(f'Content-Length: {len(PAGE) + 3}') + b'\xef\xbb\xbf' + PAGE, 'download-other'),
        (head('Content-Length: 20') + b'<?xml version="1.0"?', 'download-other'),
        (head('Content-Length: 0'), 'download-other'),
        (head('Content-Length: 90') + b'short', 'download-failed'),
        (head('Transfer-Encoding: chunked') + b'5\r\nshort\r\n', 'download-failed'),
        (head('Connection: close') + DATA, 'download-no-length'),
        (head('Content-Encoding: gzip', f'Content-Length: {len(PACKED)}') + PACKED, 'download-packed'),
        (head(f'Content-Length: {len(PACKED)}') + PACKED, 'download-other'),
        (head('Content-Length: \xb2') + DATA, 'download-no-length'),
        (b'no HTTP at all', 'download-failed'),
        (b'', 'download-failed'),
    ],
)  # fmt: skip
def test_without_a_checksum_what_cannot_be_the_file_is_refused(answer, code, tmp_path):
    with answering(answer) as url, refused(code):
        download.download(url, tmp_path / 'm', progress=False, wait=0, retries=1)
    assert [name for name in names(tmp_path) if '.part' not in name] == []


def test_without_a_checksum_the_caller_says_what_the_file_must_be(server, tmp_path):
    def check(path: Path) -> Message | None:
        return None if path.read_bytes() == DATA else Message('weights-text', 'no')

    assert fetch(server, tmp_path / 'model.bin', check=check).read_bytes() == DATA
    server.body = b'Not Found'
    with refused('download-mismatch') as caught:
        fetch(server, tmp_path / 'other.bin', check=check)
    assert caught.value.problems == [Message('weights-text', 'no')]
    assert names(tmp_path) == ['model.bin']


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                content.name = name
                tar.addfile(content)
    return path


def link(to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, to
    return info


def folder() -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = tarfile.DIRTYPE
    return info


def test_unpack(tmp_path):
    archive = make_tar(
        tmp_path / 'a.tar', {'kit': folder(), './kit/VOC/': folder(), 'kit/VOC/x/1.txt': b'1', 'kit/VOC/2.txt': b'2'}
    )
    target = download.unpack_tar(archive, 'kit/VOC', tmp_path / 'out' / 'VOC', progress=False)
    assert (target / 'x' / '1.txt').read_bytes() == b'1'
    assert names(target) == ['2.txt', 'x']
    assert names(target.parent) == ['VOC']
    with refused('unpack-exists', path=target):
        download.unpack_tar(archive, 'kit/VOC', target, progress=False)


def test_unpack_lists_all_members_that_do_not_belong(tmp_path):
    bad = {
        '/kit/VOC/a': b'',
        '../b': b'',
        'kit/VOC/../../c': b'',
        'other/d': b'',
        'kit': b'',
        'kit/VOC/e': link('/etc/passwd'),
        'kit/VOC/f': link('kit/VOC/g', tarfile.LNKTYPE),
    }
    archive = make_tar(tmp_path / 'a.tar', {'kit/VOC/good': b'', **bad})
    with refused('unpack-members', inner='kit/VOC') as caught:
        download.unpack_tar(archive, 'kit/VOC', tmp_path / 'out' / 'VOC', progress=False)
    assert caught.value.problems == list(bad)
    assert names(tmp_path / 'out') == []


def test_unpack_of_damaged_archives(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / 'a.tar', {'kit/VOC/a': DATA, 'kit/VOC/b': DATA})
    whole = archive.read_bytes()
    for damaged in (b'', b'no tar', whole[: len(whole) // 2], whole[:1000]):
        archive.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            download.unpack_tar(archive, 'kit/VOC', tmp_path / 'out' / 'VOC', progress=False)
        assert caught.value.code in ('unpack-failed', 'unpack-members')
        assert caught.value.facts['archive'] == archive
        assert names(tmp_path / 'out') == []
    archive.write_bytes(whole)
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': len(DATA)}))
    with refused('disk-full'):
        download.unpack_tar(archive, 'kit/VOC', tmp_path / 'out' / 'VOC', progress=False)
    assert names(tmp_path / 'out') == []
