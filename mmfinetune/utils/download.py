"""Downloads that resume, are verified, and appear only when complete."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mmfinetune.utils import console
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import CHUNK, digest, looks_like, writing

# Set in the environment: nothing is downloaded.
OFFLINE = 'MMFINETUNE_OFFLINE'
_BY_HAND = 'download {url} by other means and put it at {dst}'
_MIRROR = 'try a mirror, or ' + _BY_HAND
_AGAIN = 'run again, ' + _MIRROR
_MOST = 1 << 34  # bytes of a file whose size nobody says


def download(
    url: str,
    dst: str | Path,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    timeout: float = 30,
    progress: bool = True,
    retries: int = 3,
    wait: float = 1.0,
    check: Callable[[Path], Message | None] | None = None,
) -> Path:
    """Download `url` to `dst`, which appears only when complete and verified.

    A partial download stays in `<dst>.part` and is resumed by the next call. A `dst` that
    already passes the checks is not downloaded again, and one that fails them is replaced only by
    one that passes.

    Args:
        url: An http or https address.
        dst: The file to make.
        sha256: Expected SHA-256, all of it or its first digits (as in the names of model files).
        md5: Expected MD5.
        size: Expected size in bytes.
        timeout: Seconds without an answer before a try counts as failed.
        progress: Whether to show a progress bar.
        retries: Further tries that bring nothing new; one that does resets the count.
        wait: Seconds before the first retry, doubled for each further one.
        check: Says what is wrong with the file, where there is no checksum to say it.

    Raises:
        UserError: No address, no network, an HTTP error, no room on the disk, or not the file that was expected.
    """
    dst, url = Path(dst), _checked(url)
    part = dst.with_name(dst.name + '.part')
    with writing(dst):
        if dst.is_file() and not _mismatch(dst, sha256, md5, size):
            return dst
        if OFFLINE in os.environ:
            raise UserError('download-offline', url=url, dst=dst)
        dst.parent.mkdir(parents=True, exist_ok=True)
        if size is not None and part.is_file() and part.stat().st_size > size:
            part.unlink()
        checked = bool(sha256 or md5)
        if not checked or _size(part) != size:
            _Fetch(url, dst, part, size, checked, timeout, progress).run(retries, wait)
        bad = _mismatch(part, sha256, md5, size)
        found = looks_like(part) if bad or not checked else ''
        if not bad and not checked and not found and check:
            bad = check(part)
        if bad or found:
            _forget(part)
            problems = [bad] if bad else []
            if found:
                raise UserError('download-other', problems=problems, hint=_AGAIN, url=url, dst=dst, found=found)
            raise UserError('download-mismatch', problems=problems, hint=_AGAIN, url=url, dst=dst)
        part.replace(dst)
        _forget(part)
    return dst


def unpack_tar(archive: str | Path, inner: str, target: str | Path, progress: bool = True) -> Path:
    """Unpack the folder `inner` of a tar archive as `target`, which appears only when complete.

    Raises:
        UserError: A damaged archive, one with members outside `inner` or other than files and
            folders, too little room, or `target` already exists.
    """
    archive, target, inside = Path(archive), Path(target), PurePosixPath(inner).parts
    if target.exists():
        raise UserError('unpack-exists', path=target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            bad = [member.name for member in members if not _may_unpack(member, inside)]
            if bad or not members:
                raise UserError('unpack-members', problems=bad or ['nothing'], archive=archive, inner=inner)
            # A tenth more, since each small file ends in a disk block that it does not fill.
            _check_room(target.parent, int(1.1 * sum(member.size for member in members)))
            temporary = Path(tempfile.mkdtemp(prefix='.unpack_', dir=target.parent))
            # Python 3.10 and 3.11 have the filter only from their later releases on.
            safe: dict[str, Any] = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
            for member in console.bar(members, progress, desc=f'unpack {archive.name}', unit='file'):
                tar.extract(member, temporary, set_attrs=False, **safe)
        temporary.joinpath(*inside).rename(target)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError('unpack-failed', archive=archive, target=target, reason=error) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _checked(url: str) -> str:
    """An address as it is sent: its path in ASCII.

    Raises:
        UserError: It is none, or of another scheme than http and https.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        # The port and the host are looked at only here; a host may be of any letters.
        usable = parts.scheme in ('http', 'https') and bool(parts.hostname) and parts.port != 0
        usable = usable and bool((parts.hostname or '').encode('idna')) and not re.search(r'[\s\x00-\x1f\x7f]', url)
        path, query = (urllib.parse.quote(part, safe="%/:=&?~#+!$,;'@()*[]") for part in (parts.path, parts.query))
    except ValueError:
        usable = False
    if not usable:
        raise UserError('download-address', url=url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ''))


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the same scheme, or from http to https, only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in (urllib.parse.urlsplit(req.full_url).scheme, 'https'):
            raise UserError('download-redirect', url=req.full_url, target=newurl)
        fp.close()  # urllib would read all of an answer that nobody wants
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _NetworkError(Exception):
    """A failure worth another try."""


class _Fetch:
    """One download into a part file, over as many connections as it takes."""

    def __init__(
        self, url: str, dst: Path, part: Path, size: int | None, checked: bool, timeout: float, progress: bool
    ) -> None:
        self.url, self.dst, self.part, self.size = url, dst, part, size
        self.checked, self.timeout, self.progress = checked, timeout, progress
        self.tag_file = _tag_file(part)

    def run(self, retries: int, wait: float) -> None:
        """Fill the part file; raises UserError when `retries` tries in a row bring no more."""
        most, failures = _size(self.part), 0
        if self.progress:
            print(f'Downloading {self.url}', file=sys.stderr, flush=True)
        while True:
            try:
                self._once()
                return
            except _NetworkError as error:
                have = _size(self.part)
                failures = 1 if have > most else failures + 1
                most = max(most, have)
                if failures > retries:
                    hint = 'check the network and run again to resume, or ' + _BY_HAND
                    facts: dict[str, Any] = dict(url=self.url, dst=self.dst, part=self.part, reason=error, kept=have)
                    raise UserError('download-failed', hint=hint, **facts) from error
                time.sleep(wait * 2 ** (failures - 1))

    def _once(self) -> None:
        request = urllib.request.Request(self.url, headers={'User-Agent': 'mmfinetune', 'Accept-Encoding': 'identity'})
        tag = self._tag()
        # Without a checksum only the server's tag can show that the rest belongs to this part.
        have = _size(self.part) if self.checked or tag else 0
        if have:
            request.add_header('Range', f'bytes={have}-')
            if not self.checked:
                request.add_header('If-Range', tag)
        try:
            response = urllib.request.build_opener(_SameScheme).open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                self._refused(error, have)
            return
        # A ValueError where the server redirects to what is no address.
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _NetworkError(getattr(error, 'reason', None) or error) from error
        with response:
            self._receive(response, have)

    def _receive(self, response: http.client.HTTPResponse, have: int) -> None:
        if response.status == 206 and not response.headers.get('Content-Range', '').startswith(f'bytes {have}-'):
            _forget(self.part)
            raise _NetworkError('the server answered with another range than asked for')
        if response.status != 206:
            # The server ignored the range, or the file there has changed: start again.
            have = 0
        length = response.headers.get('Content-Length', '')
        total = have + int(length) if length.isascii() and length.isdigit() else None
        kind = response.headers.get_content_type()
        facts: dict[str, Any] = dict(url=self.url, dst=self.dst, type=kind)
        # All of these before the part is touched: a login page must not destroy it.
        if self.size is not None and total not in (None, self.size):
            raise UserError('download-size', hint=_MIRROR, size=self.size, offered=total, **facts)
        if (packed := response.headers.get('Content-Encoding', 'identity')) != 'identity':
            raise UserError('download-packed', hint=_MIRROR, packed=packed, **facts)
        if not self.checked and kind in ('text/html', 'application/xhtml+xml'):
            raise UserError('download-other', hint=_MIRROR, found='a web page (a login or an error page?)', **facts)
        if not self.checked and self.size is None and total is None and not response.chunked:
            raise UserError('download-no-length', hint=_MIRROR, **facts)
        most = self.size or total or _MOST
        _check_room(self.dst.parent, (total or self.size or 0) - have)
        tag = response.headers.get('ETag') or response.headers.get('Last-Modified') or ''
        self.tag_file.write_text(json.dumps({'url': self.url, 'tag': tag}), encoding='utf-8')
        title: dict[str, Any] = dict(desc=self.dst.name, unit='B', unit_scale=True)
        with (
            self.part.open('ab' if have else 'wb') as file,
            console.bar(wanted=self.progress, total=total or self.size, initial=have, **title) as bar,
        ):
            while True:
                try:
                    data = response.read1(min(CHUNK, most + 1 - file.tell()))
                except (OSError, http.client.HTTPException) as error:
                    raise _NetworkError(f'connection lost ({error})') from error
                if not data:
                    break
                if file.tell() + len(data) > most:
                    _forget(self.part)
                    raise UserError('download-endless', hint=_MIRROR, most=most, **facts)
                file.write(data)
                bar.update(len(data))
        # A server that goes away ends the stream quietly, so only the count shows it.
        if total is not None and _size(self.part) < total:
            raise _NetworkError(f'connection closed after {_size(self.part):,} of {total:,} bytes')

    def _refused(self, error: urllib.error.HTTPError, have: int) -> None:
        if error.code == 416 and have:
            if error.headers.get('Content-Range', '').rpartition('/')[2] == str(have):
                return
            _forget(self.part)
            raise _NetworkError('the kept part does not fit the file on the server')
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _NetworkError(f'HTTP {error.code} {error.reason}')
        facts: dict[str, Any] = dict(
            url=self.url, dst=self.dst, status=error.code, reason=' '.join(str(error.reason).split())
        )
        raise UserError('download-http', hint='check the address, or ' + _BY_HAND, **facts) from error

    def _tag(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self.tag_file.read_text(encoding='utf-8'))
            # Weak tags are not allowed in If-Range (RFC 9110, 13.1.5).
            if known['url'] == self.url and not known['tag'].startswith('W/'):
                return known['tag']
        return ''


def _mismatch(path: Path, sha256: str | None, md5: str | None, size: int | None) -> Message | None:
    """What is wrong with a file's size or checksum."""
    if size is not None and _size(path) != size:
        return Message('file-size', size=size, found=_size(path))
    for kind, expected in (('sha256', sha256), ('md5', md5)):
        if expected and not (found := digest(path, kind)).startswith(expected.lower()):
            return Message('file-digest', kind=kind, digest=expected.lower(), found=found)
    return None


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError('disk-full', path=folder, wanted=wanted / 1e9, free=free / 1e9)


def _may_unpack(member: tarfile.TarInfo, inside: tuple[str, ...]) -> bool:
    parts = PurePosixPath(member.name).parts
    within = parts[: len(inside)] == inside[: len(parts)] and '..' not in parts
    return within and (member.isdir() or (member.isreg() and len(parts) > len(inside)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + '.json')


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
