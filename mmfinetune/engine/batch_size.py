"""What a training takes, measured on what it builds: the largest batch that fits the GPU."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmfinetune.utils.building import building
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

LIMIT = 256
# Kept free, for images with more objects than any that was tried, and for fragmentation.
RESERVE = 0.1


def largest(fits: Callable[[int], bool], limit: int = LIMIT) -> int:
    """The largest number for which ``fits`` holds, if it holds for all smaller ones; 0 for none.

    Doubles, then halves the interval: about 2 log2 of the result calls.
    """
    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, bad * 2
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def find(cfg: Config) -> int:
    """Find the images per GPU by training steps of growing batches of the worst kind, optimizer included."""
    import torch

    if not torch.cuda.is_available():
        raise UserError('batch-size-no-gpu')
    samples = worst_samples(cfg)
    # What other programs hold is not available.
    free, _ = torch.cuda.mem_get_info()

    def fits(size: int) -> bool:
        try:
            used = _peak_of_steps(cfg, worst_batch(samples, size))
        except torch.OutOfMemoryError:
            return False
        finally:
            # Models hold reference cycles.
            gc.collect()
            torch.cuda.empty_cache()
        return used < (1 - RESERVE) * free

    size = largest(fits)
    if not size:
        raise UserError('batch-size-none-fits')
    print(f'--batch-size auto: {size} images per GPU', flush=True)
    return size


def worst_samples(cfg: Config, count: int = 16) -> list[dict]:
    """Training samples as the pipeline gives them, up to ``count`` with most objects (first) and as many of all shapes.

    A pipeline that draws the scale gives each one of its sizes.
    """
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    with building('train_dataloader.dataset'):
        dataset = DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    # Sorted and taken evenly: extremes and what is in between. With a limit on both sides the
    # largest image is neither the widest nor the squarest.
    by_shape = sorted(range(len(infos)), key=lambda i: infos[i]['width'] / infos[i]['height'])
    shapes = [by_shape[round((len(infos) - 1) * k / (count - 1))] for k in range(count)]
    by_objects = sorted(range(len(infos)), key=lambda i: -len(infos[i].get('instances', ())))
    samples = [dataset[i] for i in {*by_objects[:count], *shapes}]
    return sorted(samples, key=lambda s: -len(s['data_samples'].gt_instances))


def worst_batch(samples: Sequence[dict], size: int) -> list[dict]:
    """A batch of the samples with most objects, padded as much as any batch of that size can be.

    Upright and wide images meet in one batch, with AspectRatioBatchSampler in the last of an epoch;
    it is as high as the first and as wide as the second.
    """
    from torch.nn.functional import pad

    shapes = [sample['inputs'].shape[-2:] for sample in samples]
    high, wide = (max(side) for side in zip(*shapes, strict=True)) if size > 1 else max(shapes, key=math.prod)
    batch = [copy.deepcopy(samples[i % len(samples)]) for i in range(size)]
    height, width = batch[0]['inputs'].shape[-2:]
    # The others are padded to the size of this one.
    batch[0]['inputs'] = pad(batch[0]['inputs'], (0, max(0, wide - width), 0, max(0, high - height)))
    return batch


def train_steps(cfg: Config, batch: list[dict], device: str, steps: int = 2) -> torch.nn.Module:
    """Train a fresh model on a batch; from the second step on the optimizer has its state."""
    from mmdet.registry import MODELS
    from mmengine.dataset import pseudo_collate
    from mmengine.optim import build_optim_wrapper

    with building('model'):
        model = MODELS.build(copy.deepcopy(cfg.model)).to(device)
    model.train()
    settings = copy.deepcopy(cfg.optim_wrapper)
    # Steps too small to matter, and each one an update.
    settings.optimizer.lr = 1e-9
    settings.accumulative_counts = 1
    if settings.type == 'AmpOptimWrapper':
        # The first steps of a dynamic scale are skipped, without the optimizer's state.
        settings.loss_scale = 1.0
    wrapper = build_optim_wrapper(model, settings)
    for _ in range(steps):
        model.train_step(pseudo_collate(copy.deepcopy(batch)), wrapper)
    return model


def _peak_of_steps(cfg: Config, batch: list[dict]) -> int:
    """Peak memory in bytes of training steps on a batch."""
    import torch
    from mmengine.dist import get_world_size

    torch.cuda.reset_peak_memory_stats()
    model = train_steps(cfg, batch, 'cuda')
    used = torch.cuda.max_memory_reserved()
    if get_world_size() > 1:
        # Of DistributedDataParallel, which sends gradients in copies.
        used += sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return used
