"""Where the results of checks are kept, found again by the content of what was checked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfinetune.data.check.findings import Report
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import MOST_JSON, atomic_write_bytes, sha256_of

# Of the checks; a new one makes earlier results invalid.
VERSION = 3
_KEPT = 50  # results


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mmfinetune/checks``; not next to the data, which may be read-only."""
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'mmfinetune' / 'checks'


class Cache:
    """The result of one check.

    Its key is the SHA-256 of the annotation files, with their places, the classes, the options
    and the version of the checks. A file whose place, size and time of change are those of an
    earlier one is not read again for its SHA-256; image files are compared by size and time.
    A cache that cannot be read or written is done without.
    """

    def __init__(
        self, splits: Mapping[str, tuple[Path, Path | None]], classes: Sequence[str] | None, options: Sequence[object]
    ) -> None:
        self.folder = cache_folder()
        self.file: Path | None = None
        with contextlib.suppress(OSError, ValueError):
            places = [
                (name, str(path.resolve()), root and str(root.resolve()), self._sha256(path))
                for name, (path, root) in splits.items()
            ]
            text = json.dumps([VERSION, list(options), classes and list(classes), str(Path.cwd()), places])
            self.file = self.folder / f'{hashlib.sha256(text.encode()).hexdigest()}.json'

    def find(self) -> Report | None:
        """The result of the same check, if no image has changed since."""
        try:
            kept: Any = json.loads(self.file.read_bytes()) if self.file else None
            return Report.from_cache(kept['report']) if kept['stamp'] == _stamp(kept['images']) else None
        # There may be no such file, and a damaged one can be anything.
        except Exception:
            return None

    def keep(self, report: Report, images: Iterable[Path | None]) -> None:
        """Keep a result, and forget the oldest ones."""
        names = [str(path) for path in images if path is not None]
        with contextlib.suppress(UserError, OSError, ValueError):
            content = json.dumps({'stamp': _stamp(names), 'images': names, 'report': dataclasses.asdict(report)})
            if self.file is not None:
                atomic_write_bytes(self.file, content.encode())
            for old in sorted(self.folder.glob('*.json'), key=lambda p: p.stat().st_mtime)[:-_KEPT]:
                old.unlink(missing_ok=True)

    def _sha256(self, path: Path) -> str:
        status = path.stat()
        key = hashlib.sha256(f'{path.resolve()}|{status.st_size}|{status.st_mtime_ns}'.encode())
        known = self.folder / 'sha256' / key.hexdigest()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if len(text := known.read_text()) == 64:
                return text
        digest = sha256_of(path, MOST_JSON)
        with contextlib.suppress(UserError):
            atomic_write_bytes(known, digest.encode())
        return digest


def _stamp(paths: Sequence[str]) -> str:
    """A digest of the sizes and times of files."""
    stamp = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 (a Path for each would double the time)
            stamp.update(b'%d %d\n' % (status.st_size, status.st_mtime_ns))
        except OSError:
            stamp.update(b'-\n')
    return stamp.hexdigest()
