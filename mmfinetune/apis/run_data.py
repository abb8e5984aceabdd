"""The data of a run: annotation files made where they are missing, then checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config.views import annotation_file, dataset_classes, dataset_configs
from mmfinetune.data import coco_json, demo
from mmfinetune.data.formats import voc, voc_devkit
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


def prepare_data(cfg: Config, train: bool = True) -> dict[str, coco_json.Split]:
    """Make missing annotation files from what is there, then check all that the run reads.

    Args:
        cfg: Resolved config.
        train: Whether the training split is needed.

    Returns:
        What each split holds.

    Raises:
        UserError: No data, or data that does not fit the config.
    """
    datasets = {s: d for s, d in dataset_configs(cfg).items() if train or s == 'test'}
    missing = [d for d in datasets.values() if not annotation_file(d).is_file()]
    if missing:
        _make_annotations(cfg, [annotation_file(d) for d in missing], Path(missing[0]['data_root']))
    splits: dict[str, coco_json.Split] = {}
    done: dict[Path, coco_json.Split] = {}
    for name, dataset in datasets.items():
        path = annotation_file(dataset)
        if path not in done:
            root = Path(dataset.get('data_root') or '')
            prefix = (dataset.get('data_prefix') or {}).get('img', '')
            done[path] = coco_json.read_split(path, root / prefix, dataset_classes(dataset))
        splits[name] = done[path]
    return splits


def _make_annotations(cfg: Config, paths: list[Path], root: Path) -> None:
    recipe = dict(cfg.get('demo_data') or {})
    if recipe:
        make = demo.MAKERS[recipe.pop('kind')]
        root = make(Path(recipe.pop('root')), **recipe)
        if all(p.is_file() for p in paths):
            return
    try:
        # The config's data_root is the VOC2012 folder; the devkit may lie two folders up.
        voc2012 = voc_devkit.find_devkit(root)
    except UserError:
        raise UserError(
            'There is no data yet. Looked for:',
            [*dict.fromkeys(map(str, paths)), f'{root} (a VOC 2012 devkit)'],
            'fetch and convert VOC 2012 with `python tools/prepare_voc.py --download`, '
            'or pass its folder with --data-root',
        ) from None
    voc.convert(voc2012, paths[0].parent)


def splits_of_config(cfg: Config) -> tuple[dict[str, tuple[Path, Path]], Sequence[str]]:
    """Splits and class names that a resolved config trains, validates and tests with."""
    from mmfinetune.config import views

    splits = {}
    for name, dataset in views.dataset_configs(cfg).items():
        prefix = (dataset.get('data_prefix') or {}).get('img', '')
        root = Path(dataset.get('data_root') or '') / prefix
        splits[name] = (views.annotation_file(dataset), root)
    return splits, views.class_names(cfg)
