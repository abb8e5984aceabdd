"""What a config says about its data: data sets, class names, evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config


def evaluators(cfg: Config, split: str) -> list:
    """The evaluator configs of a split, whether the config has none, one or a list."""
    found = cfg.get(f'{split}_evaluator') or []
    return found if isinstance(found, list) else [found]


def dataset_configs(cfg: Config) -> dict[str, Any]:
    """The dataset configs by split, without wrappers."""
    found = {}
    for split in ('train', 'val', 'test'):
        dataset = innermost((cfg.get(f'{split}_dataloader') or {}).get('dataset'))
        if dataset is not None and 'ann_file' in dataset:
            found[split] = dataset
    return found


def annotation_file(dataset: Any) -> Path:
    """Where a dataset config reads its annotations."""
    return Path(dataset.get('data_root') or '') / dataset['ann_file']


def dataset_classes(dataset: Any) -> Sequence[str] | None:
    """Class names of a dataset config, else those of its type."""
    own = (dataset.get('metainfo') or {}).get('classes')
    if own:
        return own
    from mmdet.registry import DATASETS

    return (getattr(DATASETS.get(dataset['type']), 'METAINFO', None) or {}).get('classes')


def class_names(cfg: Config) -> Sequence[str]:
    """Classes of the data in label order; empty if the config does not say."""
    dataset = next(iter(dataset_configs(cfg).values()), None)
    return tuple(dataset_classes(dataset) or ()) if dataset is not None else ()


def innermost(dataset: Any) -> Any:
    """A dataset config without its wrappers (RepeatDataset and the like)."""
    while dataset is not None and 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset
