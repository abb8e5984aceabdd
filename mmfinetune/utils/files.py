"""Files: written completely or not at all, found in natural order, read with short reasons."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mmfinetune.utils.errors import Problem, UserError

CHUNK = 1 << 20  # bytes
MOST_TEXT = 1 << 28  # bytes of a label file of one image, a list, a YAML file
MOST_JSON = 1 << 32  # bytes of a file for a whole data set; LVIS has about 1 GB


def open_regular(path: str | Path, most: float = math.inf) -> BinaryIO:
    """Open a file to be read; what could block or never end (a FIFO, a device) is refused.

    Raises:
        OSError: It cannot be opened, is not a regular file, or has more than `most` bytes.
    """
    # Opening a FIFO would wait for somebody who writes.
    file = open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    status = os.fstat(file.fileno())
    reason = '' if stat.S_ISREG(status.st_mode) else 'not a regular file but a device or a pipe'
    if status.st_size > most:
        reason = f'{status.st_size:,} bytes, more than the {most:,} that are read'
    if reason:
        file.close()
        raise OSError(errno.EINVAL, reason, str(path))
    return file


def read_regular(path: str | Path, most: float) -> bytes:
    """The content of a file, see `open_regular`; one of zeros, as a download that was cut short may be, is refused."""
    with open_regular(path, most) as file:
        if file.read(4) == bytes(4):
            raise OSError(errno.EINVAL, 'it begins with zeros, as an incomplete download may', str(path))
        file.seek(0)
        return file.read()


def is_within(path: str | Path, *roots: str | Path) -> bool:
    """Whether a path is in one of some folders, by its name or once links are followed.

    By its name, since links within a data set are its owner's; a folder may itself be known by two names.
    """
    with contextlib.suppress(ValueError):  # no file has such a name
        for spell in (os.path.abspath, os.path.realpath):
            if any(Path(spell(path)).is_relative_to(spell(root)) for root in roots):
                return True
    return False


def atomic_write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files; none of them changes before all new contents are on the disk.

    Args:
        contents: The bytes for each path. Missing folders are made; a symbolic link is followed.

    Raises:
        UserError: A file cannot be written (rights, disk full); existing files stay as they were.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, data in contents.items():
            with writing(path):
                target = Path(os.path.realpath(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                # In the target's folder, since a rename is atomic within one file system only; not
                # by mkstemp, whose files only their owner may read.
                temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
                staged.append((temporary, target))
                with temporary.open('wb') as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        for temporary, target in staged:
            with writing(target):
                temporary.replace(target)
    finally:
        for temporary, _ in staged:
            # A read-only disk refuses to remove even what is not there.
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: the file or folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError('file-not-writable', path=path, reason=reason_of(error)) from error


def require_writable(folder: str | Path) -> None:
    """Refuse a folder in which nothing can be written, before the work instead of after it.

    A temporary file is written in the nearest folder that exists, since `os.access` is wrong for
    root and on NFS. No folder is made or removed.

    Raises:
        UserError: It cannot be written.
    """
    with writing(Path(folder).absolute()), tempfile.TemporaryFile(dir=nearest(folder)):
        pass


def nearest(folder: str | Path) -> Path:
    """The folder, or that above it that exists."""
    folder = Path(folder).absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def require_folder(folder: str | Path, before: os.stat_result) -> None:
    """Check that a folder that a run writes to is still the one that it was.

    Raises:
        UserError: It was removed, or there is a new one of its name.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(before, Path(folder).stat()):
            return
    raise UserError('work-dir-gone', work_dir=folder)


def reason_of(error: Exception) -> str:
    """Why reading or writing failed, in a few words."""
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, completely or not at all; see `atomic_write_all`."""
    atomic_write_all({Path(path): data})


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, completely or not at all; see `atomic_write_all`."""
    atomic_write_bytes(path, text.encode())


def json_bytes(value: object, indent: int | None = None) -> bytes:
    """`value` as JSON with a final newline; NaN and infinity raise ValueError.

    Data are ASCII, since other programs read them in the encoding of the locale; with an indent, for people, UTF-8
    (but ASCII where that cannot hold a half character of a foreign file).
    """

    def dumped(ascii: bool) -> bytes:
        separators = (',', ':') if indent is None else None
        text = json.dumps(value, ensure_ascii=ascii, allow_nan=False, indent=indent, separators=separators)
        return text.encode() + b'\n'

    try:
        return dumped(indent is None)
    except UnicodeEncodeError:
        return dumped(True)


def is_writable(value: object) -> bool:
    """Whether a value from a JSON file can be written again: without NaN, half characters and depths."""
    try:
        json_bytes(value).decode()
    except (ValueError, RecursionError):
        return False
    return True


def atomic_write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Write `value` as JSON to `path`, completely or not at all; see `atomic_write_all`."""
    atomic_write_bytes(path, json_bytes(value, indent))


def sha256_of(path: str | Path, most: float = math.inf) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits; OSError if it has more than `most` bytes."""
    return digest(Path(path), 'sha256', most)


def digest(path: Path, kind: str, most: float = math.inf) -> str:
    """A checksum of a file's content in hexadecimal digits; `kind` is an algorithm of `hashlib`, e.g. 'md5'."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open_regular(path, most) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def looks_like(file: Path | bytes) -> str:
    """What a file or its first bytes are, if it is one that often stands in for a binary one.

    Nothing, a web page (saved instead of the download), a Git LFS pointer, a packed file; '' if none of these.
    """
    if isinstance(file, Path):
        try:
            with open_regular(file) as opened:
                file = opened.read(512)
        except OSError:
            return ''
    start = file[:512]
    if not start:
        return 'an empty file'
    if start.startswith(b'\x1f\x8b'):
        return 'a gzip file (unpack it)'
    start = start.removeprefix(b'\xef\xbb\xbf').lstrip().lower()
    if re.match(rb'<(!doctype|html|head|body|script|title|meta|!--|\?xml)', start):
        return 'a web page (a login or an error page?)'
    if start.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer (run `git lfs pull`)'
    return ''


_NOT_DATA = frozenset({'__MACOSX', 'Thumbs.db'})


def natural_key(text: str | Path) -> tuple:
    """A sort key in which `img2` comes before `img10`; no two texts compare as equal."""
    text = text.as_posix() if isinstance(text, Path) else text
    # Digits stand at odd places, so that numbers meet numbers only; as text, since Python limits what int() takes.
    digits = ((len(part.lstrip('0')), part.lstrip('0')) for part in re.findall(r'[0-9]+', text))
    words = (word.casefold() for word in re.split(r'[0-9]+', text))
    return (tuple(itertools.chain.from_iterable(itertools.zip_longest(words, digits, fillvalue=(0, '')))), text)


def find_files(root: str | Path, suffixes: Iterable[str]) -> list[Path]:
    """All files below a folder with one of the suffixes, in natural order of their paths.

    Hidden files and folders and `__MACOSX` are skipped. Linked folders are followed, each folder
    once, so that a link to a folder above does no harm.

    Args:
        root: The folder.
        suffixes: In lower case with the dot; the case of the files' own does not matter.
    """
    suffixes = frozenset(suffixes)
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        place = Path(folder)
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # The order decides by which of two links a folder is reached.
        subfolders[:] = sorted(filter(_is_data, subfolders))
        found += [path for name in filter(_is_data, names) if (path := place / name).suffix.lower() in suffixes]
    return sorted(found, key=natural_key)


def _is_data(name: str) -> bool:
    return not name.startswith('.') and name not in _NOT_DATA


def shown(path: Path, root: Path) -> str:
    """A path for messages: relative to the data set if it is in it, with slashes."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text of a label file of at most so many bytes: UTF-8, or UTF-16 with its mark.

    Raises:
        Problem: It is missing, unreadable, too large or not text.
    """
    try:
        data = read_regular(path, most)
    except FileNotFoundError:
        raise Problem('text-file-missing') from None
    except OSError as error:
        raise Problem('text-file-unreadable', reason=reason_of(error)) from None
    try:
        # A mark in front (Windows editors write it) would become part of the first word.
        return data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise Problem('text-file-encoding', byte=error.start) from None


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """The value of a JSON file; NaN and infinity are let through, see `masks.check_polygon`.

    Raises:
        Problem: See `read_text`; or it is not JSON, with the place.
    """
    text = read_text(path, most)
    if not text.strip():
        raise Problem('json-empty')
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Problem('json-syntax', reason=error.msg, line=error.lineno, column=error.colno) from None
    except ValueError:  # Python converts no integers of thousands of digits
        raise Problem('json-number') from None
    except RecursionError:
        raise Problem('json-nesting') from None


_YAML_DEPTH, _YAML_PARTS = 50, 1_000_000


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of plain data, whose anchors do not unfold to more than a million parts.

    Raises:
        Problem: See `read_text`; or it is not such YAML.
    """
    import yaml

    text = read_text(path)
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    try:
        _require_small(yaml.parse(text, loader))
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        reason = getattr(error, 'problem', None) or ' '.join(str(error).split())
        raise Problem('yaml-syntax', reason=reason, line=mark.line + 1 if mark else 1) from None
    except Problem:
        raise
    except Exception as error:
        # A date of month 13, a tag that its text does not fit, an integer of too many digits: each raises another kind.
        raise Problem('yaml-value', reason=error) from None


def _require_small(events: Iterable[Any]) -> None:
    """Refuse YAML whose parts are nested too deeply or, each counted wherever it is referred to, too many."""
    import yaml

    sizes: dict[str | None, int] = {}
    open_parts: list[tuple[str | None, int]] = [(None, 0)]
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_parts.append((event.anchor, 0))
            if len(open_parts) > _YAML_DEPTH:
                raise Problem('yaml-nesting')
            continue
        added = 1
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, inside = open_parts.pop()
            added = sizes[anchor] = inside + 1
        elif isinstance(event, yaml.AliasEvent):
            added = sizes.get(event.anchor, 1)
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif event.anchor:
            sizes[event.anchor] = 1
        anchor, inside = open_parts[-1]
        open_parts[-1] = anchor, inside + added
        if inside + added > _YAML_PARTS:
            raise Problem('yaml-unfolds', count=_YAML_PARTS)


_HASH = re.compile(r'[-_]([0-9a-f]{8,64})\.(?:pth|pt|pkl|safetensors)$')


def hash_in_name(name: str | Path) -> str | None:
    """The SHA-256 prefix at the end of a file name (torch hub's and mmdet's convention)."""
    found = _HASH.search(Path(name).name)
    return found.group(1) if found else None
