"""From a config to checked data: where the data are, what is made of them, whether they fit the model."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config import views
from mmfinetune.config.keys import dicts
from mmfinetune.data.formats import voc_devkit
from mmfinetune.data.layout import SPLITS
from mmfinetune.utils.errors import Message, UserError

if TYPE_CHECKING:
    from mmengine.config import Config

ANNOTATIONS = 'annotations'


def set_data_root(cfg: Config, root: Path) -> None:
    """Point all data sets and evaluators of a config at another folder.

    Args:
        cfg: Changed in place.
        root: A folder with ``VOCdevkit/VOC2012`` in it, that folder itself, or any folder with
            the annotation files that the config names.

    Raises:
        UserError: The folder has neither, or the config's data are in several folders.
    """
    if not root.is_dir():
        raise UserError('data-root-missing', path=root)
    datasets = views.dataset_configs(cfg)
    if len(roots := {str(d.get('data_root')): None for d in datasets.values()}) > 1:
        raise UserError('data-root-several', problems=[*roots], path=root)
    if not all((root / d['ann_file']).is_file() for d in datasets.values()):
        try:
            root = voc_devkit.find_devkit(root)
        except UserError as error:
            files = dict.fromkeys(root / d['ann_file'] for d in datasets.values())
            raise UserError(
                'data-root-empty',
                problems=[*(Message('data-searched', path=file) for file in files), error.message],
                path=root,
            ) from None
    for name, dataset in datasets.items():
        dataset['data_root'] = str(root)
        _point_evaluators(cfg, views.split_of(name), root / dataset['ann_file'])
    cfg.pop('demo_data', None)


def _point_evaluators(cfg: Config, split: str, ann_file: Path) -> None:
    for evaluator in views.evaluators(cfg, split):
        if 'ann_file' in evaluator:
            evaluator['ann_file'] = str(ann_file)


def redirect_annotations(cfg: Config, folder: Path | None = None) -> None:
    """Let annotation files that must be made go to a folder; by default to the work dir if the devkit is read-only."""
    for name, dataset in views.dataset_configs(cfg).items():
        path, root = views.annotation_file(dataset), Path(dataset.get('data_root') or '')
        if not path.is_file() and root.is_dir() and (folder or not os.access(root, os.W_OK)):
            ann_file = (folder or Path(cfg.work_dir).resolve() / ANNOTATIONS) / path.name
            dataset['ann_file'] = str(ann_file)
            _point_evaluators(cfg, views.split_of(name), ann_file)


def check_heads(cfg: Config) -> None:
    """Compare ``num_classes`` of all heads with the class list of the data.

    Raises:
        UserError: They differ.
    """
    classes = len(views.class_names(cfg))
    # An RPN distinguishes objects from background only.
    problems = [
        Message('head-classes', key=f'{place}.num_classes', count=node['num_classes'])
        for place, node in dicts(cfg.model, 'model')
        if node.get('num_classes') not in (None, classes) and 'rpn' not in place
    ]
    if problems and classes:
        raise UserError('config-class-count', problems=problems, classes=classes)


def select_split(cfg: Config, split: str) -> None:
    """Make a split the one that is tested: the test pipeline, all images, in their order.

    Raises:
        UserError: The config does not have it, or not as one annotation file.
    """
    loaders = {s: cfg.get(f'{s}_dataloader') for s in reversed(SPLITS)}  # that of the test is named first
    files = {views.annotation_file(d): d for n, d in views.dataset_configs(cfg).items() if views.split_of(n) == split}
    if len(files) != 1:
        raise UserError(
            'config-no-split', split=split, others=', '.join(s for s in loaders if s != split and loaders[s])
        )
    chosen = next(iter(files.values()))
    if split == 'train':
        cfg.test_dataloader = copy.deepcopy(loaders['test'] or loaders['val'])
        if cfg.test_dataloader is None:
            raise UserError('config-no-test-pipeline')
        dataset = views.innermost(cfg.test_dataloader.dataset)
        for key in ('data_root', 'ann_file', 'data_prefix', 'metainfo', 'indices'):
            dataset.pop(key, None)
            if key in chosen:
                dataset[key] = copy.deepcopy(chosen[key])
        dataset.test_mode = True  # or images without objects would be left out
    else:
        cfg.test_dataloader, dataset = loaders[split], chosen
    cfg.test_dataloader.dataset = dataset  # each image once, whatever wraps it
    cfg.test_evaluator = copy.deepcopy(views.evaluators(cfg, 'val' if split == 'train' else split))
    _point_evaluators(cfg, 'test', views.annotation_file(dataset))
