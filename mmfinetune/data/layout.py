"""Where the folder of a prepared data set keeps its files, and where to look for the images of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.utils.errors import UserError

SPLITS = ('train', 'val', 'test')
_PREFIX = 'instances_'
_SAMPLE = 20  # image names that are tried in a folder


def file_name(split: str) -> str:
    """``instances_train.json`` of ``train``."""
    return f'{_PREFIX}{split}.json'


WHOLE = file_name('all')


def split_name(path: Path) -> str:
    """``train`` of ``instances_train.json``."""
    return path.stem.removeprefix(_PREFIX) or path.stem


@dataclass(frozen=True)
class Prepared:
    """A folder with ``annotations/instances_<split>.json`` and ``images/``."""

    root: Path

    @property
    def annotations(self) -> Path:
        return self.root / 'annotations'

    @property
    def images(self) -> Path:
        return self.root / 'images'

    def annotation(self, split: str) -> Path:
        return self.annotations / file_name(split)

    def splits(self) -> dict[str, Path]:
        """The annotation files of train, val and, where there is one, test.

        Raises:
            UserError: Train or val is missing.
        """
        files = {split: self.annotation(split) for split in SPLITS}
        missing = [files[split] for split in ('train', 'val') if not files[split].is_file()]
        if missing:
            if self.annotation('all').is_file():
                hint = 'split the data first: python tools/split_dataset.py {root}'
            else:
                hint = 'make it with `python tools/prepare_data.py SRC OUT`, then `python tools/split_dataset.py OUT`'
            raise UserError('layout-splits', problems=missing, hint=hint, root=self.root)
        return {split: file for split, file in files.items() if file.is_file()}

    def image_prefix(self, names: Sequence[str]) -> str:
        """What file names are relative to in the folder: ``images/``, nothing, or another folder in it."""
        folders = sorted(p.name for p in self.root.iterdir() if p.is_dir())
        prefixes = ['images/', '', *(f'{folder}/' for folder in folders)]
        best = max(prefixes, key=lambda prefix: _count(self.root / prefix, names))
        return best if self.images.is_dir() or _count(self.root / best, names) else ''


def find_source(given: Path) -> Path:
    """The annotation file that is meant: a file itself, or the one of a prepared folder.

    Raises:
        UserError: The folder has none, or several and no ``instances_all.json``.
    """
    if not given.is_dir():
        return given
    folder = Prepared(given).annotations
    if not folder.is_dir():
        folder = given
    if (folder / WHOLE).is_file():
        return folder / WHOLE
    found = sorted(folder.glob('*.json'))
    if not found:
        raise UserError('layout-no-source', folder=folder)
    if len(found) > 1:
        raise UserError('layout-several-sources', problems=found, folder=folder, whole=WHOLE)
    return found[0]


def find_splits(targets: Sequence[Path], images: Path | None = None) -> dict[str, tuple[Path, Path | None]]:
    """Splits from what was named on the command line.

    Args:
        targets: Annotation files, or folders with ``annotations/instances_<split>.json``.
        images: Image folder of all of them.

    Returns:
        Annotation file and image folder by split, the training split first.

    Raises:
        UserError: A folder without annotation files, or no folder of images.
    """
    if images is not None and not images.is_dir():
        raise UserError('layout-no-images', images=images)
    files = [file for target in targets for file in (_annotation_files(target) if target.is_dir() else [target])]
    splits: dict[str, tuple[Path, Path | None]] = {}
    # What is expected of the other splits comes from the training split.
    for path in sorted(dict.fromkeys(files), key=lambda p: 'train' not in split_name(p)):
        name = split_name(path)
        while name in splits:
            longer = f'{path.parent.name}/{name}'
            name = f'{name}+' if longer in splits else longer
        splits[name] = (path, images)
    return splits


def _annotation_files(folder: Path) -> list[Path]:
    found = sorted(Prepared(folder).annotations.glob('*.json')) or sorted(folder.glob('*.json'))
    found = [f for f in found if f.name.startswith(_PREFIX)] or found
    if len(found) > 1:
        # What the others were split from shares every image with them.
        found = [f for f in found if f.name != WHOLE]
    if not found:
        raise UserError('layout-no-files', folder=folder, example=Prepared(folder).annotation('<split>'))
    return found


def guess_image_root(path: Path, names: Iterable[str | None]) -> Path:
    """The folder that the image names of an annotation file are relative to.

    It is the folder with the most of the first images: ``images/`` next to ``annotations/``, a
    folder named like the split, or one of those above.
    """
    here, split = path.parent, split_name(path)
    above = here.parent if here.name else path.resolve().parent.parent
    candidates = [folder / name for folder in (above, here) for name in ('images', '', split, f'images/{split}')]
    sample = [name for name in names if name is not None][:_SAMPLE]
    return max([*candidates, above.parent], key=lambda folder: _count(folder, sample))


def _count(folder: Path, names: Sequence[str]) -> int:
    # Path.exists raises for names that are too long.
    return sum(os.path.exists(folder / name) for name in names[:_SAMPLE])  # noqa: PTH110
