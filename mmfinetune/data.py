"""From a config to checked data: where it lies, what is made of it, whether it fits the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune import coco, config, demo, devkit, voc
from mmfinetune.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

ANNOTATIONS = 'annotations'


def dataset_configs(cfg: Config) -> dict[str, Any]:
    """The dataset configs by split, wrappers taken off."""
    found = {}
    for split in ('train', 'val', 'test'):
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
        while dataset is not None and 'dataset' in dataset:
            dataset = dataset['dataset']
        if dataset is not None and 'ann_file' in dataset:
            found[split] = dataset
    return found


def annotation_file(dataset: Any) -> Path:
    return Path(dataset.get('data_root') or '') / dataset['ann_file']


def set_data_root(cfg: Config, root: Path) -> None:
    """Point all data sets and evaluators of a config at another folder.

    Args:
        cfg: Changed in place.
        root: A folder with ``VOCdevkit/VOC2012`` in it, that folder itself, or any folder with
            the annotation files that the config names.

    Raises:
        UserError: The folder has neither.
    """
    if not root.is_dir():
        raise UserError(f'There is no data folder {root}', cure='correct --data-root')
    datasets = dataset_configs(cfg)
    if not all((root / d['ann_file']).is_file() for d in datasets.values()):
        try:
            root = devkit.find_devkit(root)
        except UserError as error:
            raise UserError(
                f'{root} holds no data for this config. Looked for:',
                [str(root / a) for a in dict.fromkeys(d['ann_file'] for d in datasets.values())]
                + [f'a VOC 2012 devkit ({error.message})'],
                'pass the folder that holds VOCdevkit/, or fetch VOC 2012 with '
                '`python tools/prepare_voc.py --download`') from None
    for split, dataset in datasets.items():
        dataset['data_root'] = str(root)
        _point_evaluators(cfg, split, root / dataset['ann_file'])
    if 'demo_data' in cfg:
        cfg.pop('demo_data')


def _point_evaluators(cfg: Config, split: str, ann_file: Path) -> None:
    for evaluator in config.evaluators(cfg, split):
        if 'ann_file' in evaluator:
            evaluator['ann_file'] = str(ann_file)


def redirect_annotations(cfg: Config) -> None:
    """Let annotation files that must be made go to the work dir if the devkit is read-only."""
    for split, dataset in dataset_configs(cfg).items():
        path, root = annotation_file(dataset), Path(dataset.get('data_root') or '')
        if not path.is_file() and root.is_dir() and not os.access(root, os.W_OK):
            ann_file = Path(cfg.work_dir).resolve() / ANNOTATIONS / path.name
            dataset['ann_file'] = str(ann_file)
            _point_evaluators(cfg, split, ann_file)


def prepare_data(cfg: Config, train: bool = True) -> dict[str, coco.Split]:
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
    splits: dict[str, coco.Split] = {}
    done: dict[Path, coco.Split] = {}
    for name, dataset in datasets.items():
        path = annotation_file(dataset)
        if path not in done:
            root = Path(dataset.get('data_root') or '')
            prefix = (dataset.get('data_prefix') or {}).get('img', '')
            done[path] = coco.read_split(path, root / prefix, _classes(dataset))
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
        voc2012 = devkit.find_devkit(root)
    except UserError:
        raise UserError('There is no data yet. Looked for:',
                        [*dict.fromkeys(map(str, paths)), f'{root} (a VOC 2012 devkit)'],
                        'fetch and convert VOC 2012 with `python tools/prepare_voc.py --download`, '
                        'or pass its folder with --data-root') from None
    voc.convert(voc2012, paths[0].parent)


def _classes(dataset: Any) -> Sequence[str] | None:
    own = (dataset.get('metainfo') or {}).get('classes')
    if own:
        return own
    from mmdet.registry import DATASETS
    return (getattr(DATASETS.get(dataset['type']), 'METAINFO', None) or {}).get('classes')


def class_names(cfg: Config) -> Sequence[str]:
    """Classes of the data in label order; empty if the config does not tell."""
    dataset = next(iter(dataset_configs(cfg).values()), None)
    return tuple(_classes(dataset) or ()) if dataset is not None else ()


def check_heads(cfg: Config) -> None:
    """Compare ``num_classes`` of all heads with the class list of the data.

    Raises:
        UserError: They differ.
    """
    classes = class_names(cfg)
    if not classes:
        return
    problems = []

    def visit(node: Any, place: str) -> None:
        if isinstance(node, dict):
            count = node.get('num_classes')
            # An RPN tells objects from background only.
            if count is not None and 'rpn' not in place and count != len(classes):
                problems.append(f'{place}.num_classes = {count}')
            for key, value in node.items():
                visit(value, f'{place}.{key}')
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                visit(value, f'{place}.{i}')

    visit(cfg.model, 'model')
    if problems:
        raise UserError(f'The data has {len(classes)} classes, but the model has other numbers:',
                        problems, f'set these to {len(classes)}, or metainfo.classes to the '
                        "model's classes")
