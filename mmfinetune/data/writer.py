"""COCO JSON and images in a folder that is complete or untouched, whatever the size."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from mmfinetune.data.layout import Prepared, file_name
from mmfinetune.utils.console import bar
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import json_bytes, reason_of, require_writable, writing

ANNOTATIONS, IMAGES, REPORT = 'annotations', 'images', 'prepare_report.json'
Placing = Literal['link', 'copy', 'reference', 'in-place']

_PARTIAL, _REPLACED = '.partial', '.replaced'
_COPY_CHUNK = 1 << 24  # bytes


class Target:
    """The output folder: all is made in a hidden folder within it and moved out at the end.

    Args:
        out: The folder. Missing or empty, or, to overwrite, made by this class before.
        source: What is read; must not overlap with `out`.
        overwrite: Whether to replace what an earlier call made.

    Raises:
        UserError: The folder cannot be written, is not empty, or overlaps with the source.
    """

    def __init__(self, out: Path, source: Path, overwrite: bool) -> None:
        self.out, self.staging = out, out / _PARTIAL
        self.made: Path | None = None
        self.writers: dict[str, SplitWriter] = {}
        self._check(Path(os.path.realpath(out)), Path(os.path.realpath(source)), overwrite)
        require_writable(out)

    def _check(self, out: Path, source: Path, overwrite: bool) -> None:
        if out == source or source in out.parents:
            raise UserError('target-inside', out=self.out, source=source)
        if out in source.parents:
            raise UserError('target-around', out=self.out, source=source)
        if out.exists() and not out.is_dir():
            raise UserError('target-file', out=self.out)
        # A run that was killed leaves nothing but its hidden folder.
        present = sorted({p.name for p in out.iterdir()} - {_PARTIAL}) if out.is_dir() else []
        names = ', '.join(present[:5]) + (', …' if len(present) > 5 else '')
        if present and not overwrite:
            raise UserError('target-not-empty', out=self.out, names=names)
        if present and not (out / REPORT).is_file():
            raise UserError('target-foreign', out=self.out, report=REPORT)

    def annotation_file(self, split: str) -> Path:
        """The annotation file of a split, once committed."""
        return Prepared(self.out).annotation(split)

    def writer(self, split: str) -> SplitWriter:
        """The writer for the annotation file of a split."""
        if split not in self.writers:
            self.writers[split] = SplitWriter(self.staging / ANNOTATIONS / self.annotation_file(split).name)
        return self.writers[split]

    def __enter__(self) -> Target:
        with writing(self.out):
            missing = [p for p in (self.out, *self.out.parents) if not p.exists()]
            self.made = missing[-1] if missing else None
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.staging, ignore_errors=True)
            (self.staging / ANNOTATIONS).mkdir(parents=True)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for writer in self.writers.values():
            writer.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        if kind and self.made:
            # Only the folders that this call made, and only while they are empty.
            folder = self.out
            with contextlib.suppress(OSError):
                while folder != self.made.parent:
                    folder.rmdir()
                    folder = folder.parent

    def commit(self, report: dict[str, Any]) -> None:
        """Move all into place; the report, by which a complete folder is known, last."""
        replaced = self.staging / _REPLACED
        try:
            (self.staging / REPORT).write_bytes(json_bytes(report, indent=1))
            replaced.mkdir()
            for name in (REPORT, ANNOTATIONS, IMAGES):
                if os.path.lexists(self.out / name):
                    (self.out / name).rename(replaced / name)
            for name in (IMAGES, ANNOTATIONS, REPORT):
                (self.staging / name).rename(self.out / name)
        except OSError:
            for old in replaced.iterdir():
                if os.path.lexists(self.out / old.name):
                    (self.out / old.name).rename(self.staging / old.name)
                old.rename(self.out / old.name)
            raise


class InPlace(Target):
    """A folder for the annotation files alone: they replace those of the same names together.

    The images stay where they are; what else is in the folder stays too.
    """

    def _check(self, out: Path, source: Path, overwrite: bool) -> None:
        """Nothing: the folder may be in the source and hold other files."""

    def annotation_file(self, split: str) -> Path:
        return self.out / file_name(split)

    def commit(self, report: dict[str, Any]) -> None:  # noqa: ARG002
        """Move the annotation files into place; the report is not kept."""
        for path in (self.staging / ANNOTATIONS).iterdir():
            path.replace(self.out / path.name)


class SplitWriter:
    """An annotation file written while its images are read; holds nothing in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.images, self.annotations = path, 0, 0
        with writing(path):
            self._parts = [path.with_suffix(suffix).open('w+b') for suffix in ('.images', '.annotations')]

    def add(self, image_id: int | None, image: str, annotations: Sequence[str]) -> None:
        """Write one image and its annotations; their ids are numbered from 1.

        Args:
            image_id: Its id if it has one already.
            image: Members of the image's JSON object but for its id, without braces.
            annotations: The same of its annotations, but for `id` and `image_id`.
        """
        self.images += 1
        image_id = self.images if image_id is None else image_id
        with writing(self.path):
            self._write(0, self.images, f'{{"id":{image_id},{image}}}')
            for annotation in annotations:
                self.annotations += 1
                self._write(1, self.annotations, f'{{"id":{self.annotations},"image_id":{image_id},{annotation}}}')

    def _write(self, part: int, number: int, text: str) -> None:
        self._parts[part].write((b',' if number > 1 else b'') + text.encode())

    def finish(self, header: dict[str, Any]) -> None:
        """Put the file together; its other members (info, licenses, categories) are in `header`."""
        with writing(self.path):
            with self.path.open('wb') as file:
                file.write(json_bytes(header).rstrip()[:-1])
                for name, part in zip(('images', 'annotations'), self._parts, strict=True):
                    file.write(f',"{name}":['.encode())
                    part.seek(0)
                    shutil.copyfileobj(part, file, _COPY_CHUNK)
                    file.write(b']')
                file.write(b'}\n')
                file.flush()
                os.fsync(file.fileno())
            self.close()
            for part in self._parts:
                Path(part.name).unlink()

    def close(self) -> None:
        """Close the files; what is still to be written is lost where the disk is full."""
        for part in self._parts:
            with contextlib.suppress(OSError):
                part.close()


def place_images(
    names: Sequence[str], folder: Path, target: Path, placing: Placing, workers: int, progress: bool = True
) -> dict[str, int]:
    """Put images into the output folder.

    Args:
        names: Paths of the images relative to `folder`, with slashes.
        folder: Where they are.
        target: Folder to make.
        placing: 'link' makes hard links, and copies where the file system has none; 'reference'
            makes one symbolic link to `folder`; 'in-place' does nothing.
        workers: Number of threads.
        progress: Whether to show a progress bar.

    Returns:
        How many were linked, copied or referred to.

    Raises:
        UserError: An image cannot be read or the target not be written.
    """
    if placing == 'in-place':
        return {}
    if placing == 'reference':
        try:
            target.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError as error:
            raise UserError('target-symlink', path=target, reason=reason_of(error)) from error
        return {'referred to': len(names)}

    def place(name: str) -> str:
        # The file itself, also where the source has a symbolic link to it.
        source = os.path.realpath(folder / name)
        if placing == 'link':
            try:
                os.link(source, target / name)
                return 'linked'
            except FileNotFoundError:
                raise
            except OSError:
                pass  # another file system, or one without hard links
        shutil.copyfile(source, target / name)
        return 'copied'

    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for parent in sorted({(target / name).parent for name in names}):
                parent.mkdir(parents=True, exist_ok=True)
            counts.update(bar(pool.map(place, names), progress, total=len(names), desc='images', unit='img'))
        except OSError as error:
            pool.shutdown(wait=True, cancel_futures=True)
            path = error.filename or target
            raise UserError('target-image', path=path, placing=placing, reason=reason_of(error)) from error
    return dict(counts)
