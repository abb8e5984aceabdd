"""torchvision's Mask R-CNN weights under MMDetection's names, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import Message, UserError
from mmfinetune.weights.read import USE_OURS
from mmfinetune.weights.source import (
    BN_EPS,
    COCO_COUNT,
    FC_CLS,
    FC_REG,
    MASK_LOGITS,
    RGB_MEAN,
    RGB_STD,
    ROWS,
    Origin,
    Source,
    rename,
    rename_all,
)

if TYPE_CHECKING:
    import torch

# Released files, by SHA-256, whose frozen BN runs with another eps: torchvision calls
# overwrite_eps(model, 0.0) after it has loaded this one (detection/mask_rcnn.py).
RELEASED_EPS = {'bf2d0c1e': 0.0}

# Category ids of COCO run to 90, and torchvision has a slot for each; ten were never used.
_COCO_COUNT = 91
_COCO_SLOTS = tuple(i for i in range(1, _COCO_COUNT) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))

NAMES = {
    'backbone.body.': 'backbone.',
    **{f'backbone.fpn.inner_blocks.{i}.0.': f'neck.lateral_convs.{i}.conv.' for i in range(4)},
    **{f'backbone.fpn.layer_blocks.{i}.0.': f'neck.fpn_convs.{i}.conv.' for i in range(4)},
    'rpn.head.conv.0.0.': 'rpn_head.rpn_conv.',
    'rpn.head.cls_logits.': 'rpn_head.rpn_cls.',
    'rpn.head.bbox_pred.': 'rpn_head.rpn_reg.',
    'roi_heads.box_head.fc6.': 'roi_head.bbox_head.shared_fcs.0.',
    'roi_heads.box_head.fc7.': 'roi_head.bbox_head.shared_fcs.1.',
    'roi_heads.box_predictor.cls_score.': FC_CLS,
    'roi_heads.box_predictor.bbox_pred.': FC_REG,
    **{f'roi_heads.mask_head.{i}.0.': f'roi_head.mask_head.convs.{i}.conv.' for i in range(4)},
    'roi_heads.mask_predictor.conv5_mask.': 'roi_head.mask_head.upsample.',
    'roi_heads.mask_predictor.mask_fcn_logits.': MASK_LOGITS,
}
# Names before torchvision 0.13; its released files still have them.
OLD_NAMES = {
    **{
        f'backbone.fpn.{b}.{i}.': f'backbone.fpn.{b}.{i}.0.' for b in ('inner_blocks', 'layer_blocks') for i in range(4)
    },
    'rpn.head.conv.': 'rpn.head.conv.0.0.',
    **{f'roi_heads.mask_head.mask_fcn{i + 1}.': f'roi_heads.mask_head.{i}.0.' for i in range(4)},
}


def _convert(source: Source, _loaded: Mapping, bn_eps: float | None) -> None:
    import torch

    parts = ((key.rpartition('.'), tensor) for key, tensor in source.tensors.items())
    source.tensors = {OLD_NAMES.get(f'{module}.', f'{module}.') + end: tensor for (module, _, end), tensor in parts}
    tensors = rename_all(source, NAMES)
    count = len(tensors[FC_CLS + 'weight'])
    wrong = [
        Message('weights-slots', key=key, rows=len(tensors[key]))
        for key, _, rows in _row_tensors()
        if len(tensors[key]) != rows * count
    ]
    if wrong or count < 2:
        raise UserError('weights-heads-disagree', problems=wrong, hint=USE_OURS, path=source.path, count=count)
    slots = torch.tensor(_COCO_SLOTS if count == _COCO_COUNT else range(1, count))
    source.extra = {'slots': slots}
    for key, name, rows in _row_tensors():
        by_slot = tensors[key].unflatten(0, (count, rows))
        kept, other = _slot_order(key, slots, count)
        tensors[key] = by_slot[kept].flatten(0, 1)
        source.extra[name] = by_slot[other].flatten(0, 1)
    source.tensors = tensors
    source.style, source.rgb, source.mean, source.std = 'pytorch', True, RGB_MEAN, RGB_STD
    source.note('weights-slots-to-classes', slots=count, classes=len(slots))
    source.note('weights-same-normalisation')
    source.note('weights-roi-align')
    frozen = not any(k.endswith('num_batches_tracked') for k in tensors)
    if frozen and bn_eps is None and count == _COCO_COUNT:
        bn_eps = RELEASED_EPS.get(source.sha256[:8])
    if bn_eps is not None:
        fold_all(source, bn_eps)
    elif frozen:
        source.note('weights-eps-assumed', eps=BN_EPS)


def _slot_order(key: str, slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of MMDetection's rows in their order, and those of `count` that it has no rows for."""
    import torch

    unused = torch.tensor(sorted(set(range(1, count)) - set(slots.tolist())), dtype=torch.long)
    background = torch.zeros(1, dtype=torch.long)
    if key.startswith(FC_CLS):  # the only layer with a use for the background
        return torch.cat([slots, background]), unused
    return slots, torch.cat([background, unused])


def _row_tensors() -> Iterator[tuple[str, str, int]]:
    """(MMDetection's key, torchvision's key, rows of a class) of the layers with class rows."""
    back = {ours: theirs for theirs, ours in NAMES.items()}
    for prefix, rows in ROWS.items():
        for end in ('weight', 'bias'):
            yield prefix + end, back[prefix] + end, rows


def _fold(weight: torch.Tensor, var: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and variance that with `BN_EPS` give what these give with `eps`."""
    import torch

    variance = var.double()
    shifted = variance + (eps - BN_EPS)
    # Below this, adding BN_EPS again in fp32 would lose digits, or the variance were negative.
    enough = shifted >= BN_EPS
    gain = ((variance + BN_EPS) / (variance + eps)).sqrt()
    # Without variance and eps the original is infinite: nothing to be equal to.
    gain = torch.where(gain.isfinite(), gain, 1.0)
    rescaled = (weight.double() * gain).float()
    return torch.where(enough, weight, rescaled), torch.where(enough, shifted, variance).float()


def _bn_layers(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    layers = [k.removesuffix('running_var') for k in tensors if k.endswith('.running_var')]
    # Others are no layers; the comparison with the model says so.
    return [
        k for k in layers if k + 'weight' in tensors and tensors[k + 'weight'].shape == tensors[k + 'running_var'].shape
    ]


def fold_all(source: Source, eps: float) -> None:
    """Make BN with `BN_EPS` the function that it was with `eps`; `Source.extra` keeps the first numbers."""
    import torch

    if eps == BN_EPS:
        return
    source.extra['bn_eps'] = torch.tensor(eps, dtype=torch.float64)
    layers = _bn_layers(source.tensors)
    small = 0
    for layer in layers:
        names = layer + 'weight', layer + 'running_var'
        weight, var = (source.tensors[n] for n in names)
        source.extra |= {f'bn.{n}': source.tensors[n] for n in names}
        source.tensors |= zip(names, _fold(weight, var, eps), strict=True)
        small += int((source.tensors[names[0]] != weight).sum())
    source.note('weights-eps-folded', eps=eps, ours=BN_EPS, layers=len(layers), channels=small)


def to_torchvision(
    tensors: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor] | None = None, coco_slots: bool | None = None
) -> dict[str, torch.Tensor]:
    """The state dict of a ``maskrcnn_resnet50_fpn``, with the names since torchvision 0.13.

    With the `extra` of a torchvision source this is the exact inverse of reading it. BN then needs
    the eps of that source again (0 for torchvision's released file). Without it, BN has eps 1e-5,
    and slots that MMDetection has no rows for get zeros and a score of -1e4: in the softmax they
    are nothing, so the probabilities of the classes stay the same.

    Args:
        tensors: Under MMDetection's names; of a backbone in pytorch style fed with RGB.
        extra: `Source.extra`.
        coco_slots: Without `extra`: the 91 slots with holes instead of one for each class. None:
            when there are 80 classes.

    Raises:
        UserError: A name without counterpart in torchvision, or heads of other shapes.
    """
    extra = extra or {}
    renamed, left = rename(tensors, {ours: theirs for theirs, ours in NAMES.items()})
    problems = [Message('torchvision-no-place', key=key) for key in left]
    problems += [Message('torchvision-head-missing', key=key) for key, _, _ in _row_tensors() if key not in tensors]
    if problems:
        raise UserError('torchvision-other-model', problems=problems)
    slots, total = _target_slots(len(tensors[FC_CLS + 'weight']) - 1, extra.get('slots'), coco_slots)
    for key, name, rows in _row_tensors():
        ours = tensors[key]
        order, other = _slot_order(key, slots, total)
        if len(ours) != rows * len(order):
            raise UserError('torchvision-rows', key=key, rows=len(ours), expected=rows * len(order), classes=len(slots))
        by_slot = ours.new_zeros((total, rows, *ours.shape[1:]))
        by_slot[order] = ours.unflatten(0, (-1, rows))
        if name in extra:
            if extra[name].numel() != by_slot[other].numel():
                raise UserError('torchvision-extra', name=name, shape=tuple(extra[name].shape))
            by_slot[other] = extra[name].reshape(len(other), *by_slot.shape[1:])
        elif key == FC_CLS + 'bias':
            by_slot[other] = -1e4
        renamed[name] = by_slot.flatten(0, 1)
    if 'bn_eps' in extra:
        unfold_all(renamed, tensors, extra)
    return renamed


def _target_slots(count: int, slots: torch.Tensor | None, coco_slots: bool | None) -> tuple[torch.Tensor, int]:
    """The slot of each class, and the number of slots."""
    import torch

    coco = count == COCO_COUNT if coco_slots is None else coco_slots
    if slots is None:
        slots = torch.tensor(_COCO_SLOTS if coco else range(1, count + 1))
    else:
        possible = range(1, max(count + 1, _COCO_COUNT))
        known = set(slots.flatten().tolist()).intersection(possible) if slots.dtype == torch.int64 else ()
        if slots.shape != (len(known),) or not known:
            raise UserError('torchvision-extra', name='slots', shape=tuple(slots.shape))
        coco = max(known) > count
    if len(slots) != count:
        raise UserError('torchvision-slots', classes=count, slots=len(slots))
    return slots, _COCO_COUNT if coco else count + 1


def unfold_all(
    renamed: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor]
) -> None:
    """Put BN's numbers as they were before :func:`fold_all` into `renamed`."""
    import torch

    eps = float(extra['bn_eps'])
    for layer in _bn_layers(tensors):
        names = layer + 'weight', layer + 'running_var'
        weight, var = (tensors[n] for n in names)
        free = weight, (var.double() + (BN_EPS - eps)).float()
        kept = tuple(extra.get(f'bn.{n}', t) for n, t in zip(names, free, strict=True))
        # Rounding cannot be undone by arithmetic; channels unchanged since then get their first
        # numbers back.
        folded = _fold(kept[0], kept[1], eps)
        same = (folded[0] == weight) & (folded[1] == var)
        for name, first, now in zip(names, kept, free, strict=True):
            renamed['backbone.body.' + name.removeprefix('backbone.')] = torch.where(same, first, now)


ORIGIN = Origin('torchvision', (('backbone.body.', 'rpn.head.'),), _convert, neck='backbone.fpn.')
