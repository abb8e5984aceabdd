"""Why a training cannot have learned: what shows it, and the likeliest causes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfinetune.utils.errors import Message

MOST = 3
_LEARNED = 0.05  # AP from which on only steps that were left out are worth a word
_ZERO = 0.0005
# Of the first and last steps, whose losses are compared; with fewer steps it would be noise.
_SHARE, _ENOUGH = 0.2, 20
_FEW_STEPS = 1000  # fewer hardly train heads that start from random numbers
_OFTEN = 0.1


@dataclass(frozen=True)
class Facts:
    """What is known of a finished training.

    Attributes:
        losses: Loss of each step; NaN where the step was left out.
        rates: Base learning rate of each step.
        lr: The one that the schedule leads to.
        ap: Last validation's AP by kind, ``bbox`` and ``segm``; -1 without ground truth, absent where not validated.
        reinit: Tensors of the heads that started from random numbers; None if the whole model did.
        absent: Classes without an object in the training images.
        classes: All classes.
        objects: Training objects; None if not counted.
    """

    losses: Sequence[float]
    rates: Sequence[float]
    lr: float
    ap: dict[str, float]
    reinit: int | None
    absent: Sequence[str] = ()
    classes: int = 0
    objects: int | None = None


def signs(facts: Facts) -> list[Message]:
    """What shows that a training has not learned; empty if nothing does."""
    found = []
    if _skipped(facts) > _OFTEN * len(facts.losses):
        found.append(Message('unlearned-skipped', skipped=_skipped(facts), steps=len(facts.losses)))
    if max(facts.ap.values(), default=0) >= _LEARNED:
        return found + _masks_alone(facts)
    if _warming(facts):
        found.append(Message('unlearned-warm-up', steps=len(facts.rates), reached=max(facts.rates), lr=facts.lr))
    if facts.ap and max(facts.ap.values()) < _ZERO:
        found.append(Message('unlearned-ap', kinds=' and '.join({'bbox': 'box', 'segm': 'mask'}[k] for k in facts.ap)))
    first, last = _ends(facts)
    if last > 0.98 * first:
        found.append(Message('unlearned-loss', first=first, last=last))
    return found


def causes(facts: Facts, commands: dict[str, str]) -> list[Message]:
    """The likeliest causes, most likely first, each with the command to look at it.

    Args:
        facts: Of a training of which there are `signs`.
        commands: ``check`` (the data), ``plan``, ``weights``, ``pictures``, ``slower``, ``errors``.
    """
    first, last = _ends(facts)
    steps, shown = len(facts.losses), ', '.join(facts.absent[:5]) + (', …' if len(facts.absent) > 5 else '')
    unstable = _skipped(facts) or last > 1.05 * first
    found: list[tuple[Any, str, str, dict[str, Any]]] = [
        (facts.objects == 0, 'cause-no-objects', 'check', {}),
        (facts.ap and max(facts.ap.values()) == -1, 'cause-no-truth', 'check', {}),
        (_warming(facts), 'cause-warm-up', 'plan', dict(steps=steps)),
        (unstable, 'cause-lr-high', 'slower', dict(lr=max(facts.rates, default=facts.lr))),
        (_masks_alone(facts), 'cause-masks', 'check', {}),
        (
            2 * len(facts.absent) > facts.classes,
            'cause-absent',
            'check',
            dict(absent=len(facts.absent), classes=facts.classes, names=shown),
        ),
        (facts.reinit is None, 'cause-no-weights', 'weights', dict(steps=steps)),
        (facts.reinit and steps < _FEW_STEPS, 'cause-few-steps', 'plan', dict(steps=steps, reinit=facts.reinit)),
        (True, 'cause-data', 'pictures', {}),
        (True, 'cause-lr-low', 'plan', dict(lr=max(facts.rates, default=facts.lr))),
        (True, 'cause-scores', 'errors', {}),
    ]
    return [Message(code, command=commands[which], **more) for holds, code, which, more in found if holds][:MOST]


def _skipped(facts: Facts) -> int:
    return sum(not math.isfinite(loss) for loss in facts.losses)


def _warming(facts: Facts) -> bool:
    """Whether the learning rate was still rising at the end."""
    rates = facts.rates
    return bool(rates) and rates[-1] == max(rates) > rates[0] and rates[-1] < 0.99 * facts.lr


def _masks_alone(facts: Facts) -> list[Message]:
    """The sign of masks that are not learned where boxes are."""
    box, mask = facts.ap.get('bbox', 0.0), facts.ap.get('segm', 1.0)
    return [Message('unlearned-masks', box=box)] if box >= _LEARNED and 0 <= mask < _ZERO else []


def _ends(facts: Facts) -> tuple[float, float]:
    """Mean loss of the first and of the last steps; NaN where they are too few."""
    losses = np.array([loss for loss in facts.losses if math.isfinite(loss)])
    if len(losses) < _ENOUGH:
        return math.nan, math.nan
    count = int(_SHARE * len(losses))
    return float(losses[:count].mean()), float(losses[-count:].mean())
