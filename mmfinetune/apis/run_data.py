"""The data of a run: annotation files made where they are missing, then checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import views
from mmfinetune.data import coco_json, demo
from mmfinetune.data.check.run import check
from mmfinetune.data.formats import voc_devkit
from mmfinetune.data.preflight import Split, read_split
from mmfinetune.data.prepare import prepare
from mmfinetune.utils.dist import say
from mmfinetune.utils.errors import Message, UserError

if TYPE_CHECKING:
    from mmengine.config import Config


def prepare_data(cfg: Config, train: bool = True, full: bool = False) -> dict[str, Split]:
    """Make missing annotation files from what is there, then check all that the run reads.

    Args:
        cfg: Resolved config.
        train: Whether the training split is needed.
        full: Whether to look for all faults that training would only show by bad results, which
            reads each image once; otherwise only the headers of the images are read.

    Raises:
        UserError: No data, or data that does not fit the config or has errors.
    """
    datasets = {s: d for s, d in views.dataset_configs(cfg).items() if train or s == 'test'}
    missing = [d for d in datasets.values() if not views.annotation_file(d).is_file()]
    if missing:
        _make_annotations(cfg, [views.annotation_file(d) for d in missing], Path(missing[0]['data_root']))
    splits: dict[str, Split] = {}
    done: dict[Path, Split] = {}
    with coco_json.parsed_once():
        for name, dataset in datasets.items():
            path = views.annotation_file(dataset)
            if path not in done:
                root = None if full else _image_root(dataset)
                done[path] = read_split(path, root, views.dataset_classes(dataset))
            splits[name] = done[path]
        if full:
            places, classes = splits_of_config(cfg)
            report = check({name: places[name] for name in splits}, classes)
            if lines := report.lines(5):
                say('\n'.join(lines))
            report.require_good()
    return splits


def _make_annotations(cfg: Config, paths: list[Path], root: Path) -> None:
    if maker := dict(cfg.get('demo_data') or {}):
        make = demo.MAKERS[maker.pop('kind')]
        root = make(Path(maker.pop('root')), **maker)
        if all(p.is_file() for p in paths):
            return
    try:
        # The config's data_root is the VOC2012 folder; the devkit may be two folders up.
        voc2012 = voc_devkit.find_devkit(root)
    except UserError:
        raise UserError(
            'data-missing', problems=[*dict.fromkeys(map(str, paths)), Message('data-devkit', root=root)]
        ) from None
    prepare(voc2012, paths[0].parent, 'voc', 'in-place')


def splits_of_config(cfg: Config) -> tuple[dict[str, tuple[Path, Path]], Sequence[str]]:
    """Annotation file and image folder of each split of a resolved config, and the class names."""
    datasets = views.dataset_configs(cfg)
    splits = {name: (views.annotation_file(dataset), _image_root(dataset)) for name, dataset in datasets.items()}
    return splits, views.class_names(cfg)


def _image_root(dataset: Any) -> Path:
    return Path(dataset.get('data_root') or '') / (dataset.get('data_prefix') or {}).get('img', '')
