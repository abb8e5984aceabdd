"""What a config says about its data: data sets, class names, evaluators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.data.layout import SPLITS

if TYPE_CHECKING:
    from mmengine.config import Config


def evaluators(cfg: Config, split: str) -> list:
    """The metric configs of a split, whether the config has none, one, a list, or an ``Evaluator`` of several."""
    found = cfg.get(f'{split}_evaluator') or []
    while isinstance(found, Mapping) and 'metrics' in found:
        found = found['metrics']
    return [e for e in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(e, Mapping)]


def parts(dataset: Any, place: str = '') -> Iterator[tuple[str, Any]]:
    """The data sets of a dataset config with their dotted places: what its wrappers read, however deeply nested.

    ``ConcatDataset`` has several ``datasets``; ``RepeatDataset``, ``ClassBalancedDataset`` and
    ``MultiImageMixDataset`` have one ``dataset``.
    """
    if not isinstance(dataset, Mapping):
        return
    if isinstance(dataset.get('datasets'), (list, tuple)):
        for i, part in enumerate(dataset['datasets']):
            yield from parts(part, f'{place}.datasets.{i}')
    elif 'dataset' in dataset:
        yield from parts(dataset['dataset'], f'{place}.dataset')
    else:
        yield place, dataset


def parts_of(cfg: Config, split: str) -> list[tuple[str, Any]]:
    """The data sets of a split with their dotted places in the config."""
    return list(parts((cfg.get(f'{split}_dataloader') or {}).get('dataset'), f'{split}_dataloader.dataset'))


def vis_backends(cfg: Config) -> list:
    """The configs of the visualizer's backends, whether the config has none, one or a list."""
    found = (cfg.get('visualizer') or {}).get('vis_backends') or []
    return found if isinstance(found, list) else [found]


def dataset_configs(cfg: Config) -> dict[str, Any]:
    """The data sets that have an annotation file, by split; the parts of one split are ``train.1``, ``train.2``, …."""
    found = {}
    for split in SPLITS:
        datasets = [dataset for _, dataset in parts_of(cfg, split) if dataset.get('ann_file')]
        for number, dataset in enumerate(datasets, 1):
            found[split if len(datasets) == 1 else f'{split}.{number}'] = dataset
    return found


def split_of(name: str) -> str:
    """The split that a data set named by `dataset_configs` belongs to."""
    return name.partition('.')[0]


def annotation_file(dataset: Any) -> Path:
    """Where a dataset config reads its annotations."""
    return Path(dataset.get('data_root') or '') / dataset['ann_file']


def dataset_classes(dataset: Any) -> Sequence[str] | None:
    """Class names of a dataset config, else those of its type."""
    own = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(own, str):  # MMEngine reads a file with a name in each line
        return Path(own).read_text(encoding='utf-8').splitlines()
    if own:
        return own
    from mmdet.registry import DATASETS

    kind = dataset['type']
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    return (getattr(kind, 'METAINFO', None) or {}).get('classes')


def class_names(cfg: Config) -> Sequence[str]:
    """Classes of the data in label order; empty if the config does not say."""
    dataset = next(iter(dataset_configs(cfg).values()), None)
    return tuple(dataset_classes(dataset) or ()) if dataset is not None else ()


def innermost(dataset: Any) -> Any:
    """The first data set within the wrappers of a dataset config; None for none."""
    return next((part for _, part in parts(dataset)), None)
