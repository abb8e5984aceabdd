"""What the numbers of a config for new data follow from: statistics, input size, schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfinetune.data.statistics import Statistics
from mmfinetune.utils.errors import Message, UserError

# Where the bounds of the schedule come from: what the VOC run does (29,280 steps), a length under
# which re-initialized heads do not settle, and the 12 epochs of the model zoo's 1x schedule.
MIN_STEPS, MAX_STEPS, LONG_EPOCHS = 1500, 30_000, 12
MAX_VALIDATIONS = 40
# Features trained on COCO want some context; a smaller side saves little time.
MIN_SIDE = 256
STRIDE = 32


@dataclass(frozen=True)
class Scale:
    """Size of the network's input and of the anchors.

    Attributes:
        size: Long and short side of the box that images are fitted into, px.
        why: The arithmetic, as text.
        anchors: ``anchor_generator.scales`` if they must change.
    """

    size: tuple[int, int]
    why: str
    anchors: list[int] | None = None


@dataclass
class Schedule:
    """Length of the training.

    Attributes:
        steps: Steps of an epoch on one GPU.
        epochs: Number of them.
        why: The arithmetic, as text.
        val_interval: Epochs from one validation to the next.
        schedulers: ``param_scheduler``.
    """

    steps: int
    epochs: int
    why: str
    val_interval: int
    schedulers: list[dict]


def plan_scale(
    statistics: Statistics, base_size: tuple[int, int], anchors: Sequence[int], strides: Sequence[int]
) -> Scale:
    """Choose the size of the network's input.

    Images are fitted into a box. Its long side is what lets nine of ten objects be as large as the
    smallest anchor, but within the range between the images' own size and the base's: small images
    are not enlarged, nor large ones shrunk, more than their objects call for. Never more than twice
    the base's pixels, for memory.

    Box (px), anchor scales and feature strides (px) are those of the base.
    """
    long, short = statistics.sizes.max(1), statistics.sizes.min(1)
    ratio = float(np.median(short / long))
    # Side of the box at which an image keeps its size.
    own = np.maximum(long, short / ratio)
    relative = statistics.objects / own[statistics.image_of]
    small, large = np.quantile(relative, [0.1, 0.9])
    smallest = min(anchors) * min(strides)
    typical = float(np.median(own))
    limit = min(max(base_size), min(base_size) / ratio)
    wanted = smallest / small
    side = min(max(wanted, min(typical, limit)), max(typical, limit))
    why = (
        f'9 of 10 objects span {small:.3g} of the long side or more: {smallest:g} px (smallest '
        f'anchor) / {small:.3g} = {wanted:,.0f} px, kept between {typical:,.0f} (the images) '
        f'and {limit:,.0f} (the base)'
    )
    most = math.sqrt(2 * base_size[0] * base_size[1] / ratio)
    if side > most:
        side = most
        why += f', at most {most:,.0f} for memory'
    if side < min(MIN_SIDE, limit):
        side = min(MIN_SIDE, limit)
        why += f', but {side:,.0f} at least'
    box = [max(STRIDE, round(v / STRIDE) * STRIDE) for v in (side, side * ratio)]
    why += f'; short / long = {ratio:.2f}; multiples of {STRIDE}.'
    low, high = small * box[0], large * box[0]
    factor = _anchor_factor(low, high, smallest, max(anchors) * max(strides))
    if factor == 1:
        return Scale((box[0], box[1]), why)
    largest = max(strides) * smallest / min(strides)
    why += (
        f' Anchors x {factor:g}: they spanned {smallest:g} to {largest:g} px, 8 of 10 objects {low:.0f} to {high:.0f}.'
    )
    return Scale((box[0], box[1]), why, [max(1, round(scale * factor)) for scale in anchors])


def _anchor_factor(low: float, high: float, smallest: float, largest: float) -> float:
    """A power of 2 that brings anchors (px) within a factor 2 of most objects, if there is one.

    Changing the scales keeps the shapes of the RPN's tensors, and so its weights; more of them
    would not.
    """
    factor = 1.0
    while factor > 0.25 and low < smallest * factor / 2 and high <= largest * factor:
        factor /= 2
    while factor < 4 and high > 2 * largest * factor and low >= smallest * factor:
        factor *= 2
    return factor


def plan_schedule(
    images: int, val_images: int, batch_size: int, base_epochs: int, base_schedulers: Sequence[dict], epochs: int | None
) -> Schedule:
    """Choose the number of epochs and fit warm-up, milestones and validations to it.

    The base's epochs, more where that is under 1,500 steps, fewer where it is over 30,000, but then
    no fewer than 12.

    Args:
        images: Number of images trained on.
        val_images: Number of images of a validation.
        batch_size: Images per step on one GPU.
        base_epochs: The base's ``max_epochs``.
        base_schedulers: The base's ``param_scheduler``.
        epochs: Used unchanged, if given.

    Raises:
        UserError: The base has schedulers whose length cannot be scaled.
    """
    steps = math.ceil(images / batch_size)
    plain = f'{images:,} images / {batch_size} = {steps:,} steps an epoch'
    if epochs:
        why = f'{plain}; --epochs {epochs} = {epochs * steps:,} steps'
    else:
        epochs = max(base_epochs, math.ceil(MIN_STEPS / steps))
        bound = f', to reach {MIN_STEPS:,}' if epochs > base_epochs else ''
        longest = max(min(LONG_EPOCHS, base_epochs), MAX_STEPS // steps)
        if epochs > longest:
            epochs = longest
            bound = f', to stay under {MAX_STEPS:,}' if epochs * steps <= MAX_STEPS else f', no fewer than {epochs}'
        why = f'{plain}; {epochs} epochs (base: {base_epochs}{bound}) = {epochs * steps:,} steps'
    # A validation costs about as much as training on its images; it should take the lesser half.
    interval = max(math.ceil(epochs / MAX_VALIDATIONS), math.ceil(val_images / images))
    return Schedule(steps, epochs, why, min(interval, epochs), _schedulers(base_schedulers, steps, epochs, base_epochs))


def _schedulers(base: Sequence[dict], steps: int, epochs: int, base_epochs: int) -> list[dict]:
    result, unknown = [], []
    for scheduler in base:
        scheduler = {k: v for k, v in scheduler.items() if k != '_scope_'}
        kind, by_epoch = scheduler.get('type'), scheduler.get('by_epoch', True)
        if kind == 'LinearLR' and not by_epoch:
            # Of one step only the factor would be applied and never taken back.
            scheduler['end'] = max(2, min(scheduler['end'], steps))
        elif kind == 'MultiStepLR' and by_epoch:
            milestones = sorted({round(m / base_epochs * epochs) for m in scheduler['milestones']})
            scheduler.update(end=epochs, milestones=[m for m in milestones if 0 < m < epochs])
            if not scheduler['milestones']:
                continue
        else:
            unknown.append(Message('sizing-scheduler', type=kind, unit='epoch' if by_epoch else 'step'))
        result.append(scheduler)
    if unknown:
        raise UserError('sizing-schedulers', problems=unknown)
    return result
