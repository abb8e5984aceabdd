"""Where the folder of a prepared data set keeps its files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    pass


SPLITS = ('train', 'val', 'test')
WHOLE = 'instances_all.json'


def find_source(given: Path) -> Path:
    """The annotation file that is meant: a file itself, or the one of a prepared folder.

    Raises:
        UserError: The folder has none, or several and no ``instances_all.json``.
    """
    if not given.is_dir():
        return given
    folder = given / 'annotations' if (given / 'annotations').is_dir() else given
    if (folder / WHOLE).is_file():
        return folder / WHOLE
    found = sorted(folder.glob('*.json'))
    if not found:
        raise UserError(
            f'There is no annotation file in {folder}',
            cure='pass the file itself, or make one with `python tools/prepare_data.py SRC OUT`',
        )
    if len(found) > 1:
        raise UserError(
            f'{folder} has no {WHOLE}, but several other files:',
            map(str, found),
            'it seems to be split already; to split one of these, pass that file and --out',
        )
    return found[0]


def guess_root(path: Path, files: Sequence[str | None]) -> Path:
    """The folder that the image names of an annotation file are relative to.

    The folder with the most of the first images: ``images/`` beside ``annotations/``, a folder
    named like the split, or one of those above.
    """
    here, above = path.parent, path.parent.parent
    split = split_name(path)
    candidates = [folder / name for folder in (above, here) for name in ('images', '', split, f'images/{split}')]
    sample = [f for f in files if f is not None][:20]

    def there(folder: Path) -> int:
        count = 0
        for name in sample:
            with contextlib.suppress(OSError):
                count += (folder / name).exists()
        return count

    return max(candidates, key=there) if sample else candidates[0]


def split_name(path: Path) -> str:
    """``train`` of ``instances_train.json``."""
    return path.stem.removeprefix('instances_') or path.stem


def find_splits(targets: Sequence[Path], images: Path | None = None) -> dict[str, tuple[Path, Path | None]]:
    """Splits from what was named on the command line.

    Args:
        targets: Annotation files, or one folder with ``annotations/instances_<split>.json``.
        images: Image folder of all of them.

    Raises:
        UserError: A folder without annotation files, or several.
    """
    if images is not None and not images.is_dir():
        raise UserError(f'There is no folder {images}', cure='correct --images')
    files: list[Path] = []
    for target in targets:
        if not target.is_dir():
            files.append(target)
            continue
        found = sorted((target / 'annotations').glob('*.json')) or sorted(target.glob('*.json'))
        found = [f for f in found if f.name.startswith('instances_')] or found
        if len(found) > 1:
            # What the others were split from shares every image with them.
            found = [f for f in found if f.name != 'instances_all.json']
        if not found:
            raise UserError(
                f'{target}: no annotation files in it',
                [f'looked for {target / "annotations" / "instances_<split>.json"}'],
                'pass the JSON files, or make them with tools/prepare_data.py',
            )
        files += found
    splits: dict[str, tuple[Path, Path | None]] = {}
    # The training split first: what is expected of the others comes from it.
    for path in sorted(dict.fromkeys(files), key=lambda p: 'train' not in split_name(p)):
        name = split_name(path)
        while name in splits:
            name = f'{path.parent.name}/{name}' if f'{path.parent.name}/{name}' not in splits else name + '+'
        splits[name] = (path, images)
    return splits
