"""Weights of other origins under MMDetection's names, and the way back.

Nothing here builds a model: names, rows and BN numbers are all that differ between the libraries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from mmfinetune.data.classes import COCO_CLASSES
from mmfinetune.utils.errors import UserError
from mmfinetune.weights.find import verify_file
from mmfinetune.weights.origins.detectron2 import from_detectron2
from mmfinetune.weights.origins.mmdet import from_mmdet
from mmfinetune.weights.origins.torchvision import from_torchvision
from mmfinetune.weights.read import CURE, check_finite, clean, load, named_tensors
from mmfinetune.weights.source import FC_CLS, RGB_MEAN, RGB_STD, Source

KINDS = ('mmdet', 'mmdet run', 'torchvision', 'detectron2', 'backbone', 'other')

# The first that fits a key names the architecture, so the special come before the general.
_OTHER_MODELS = (
    (r'(roi_head\.shared_head|roi_heads\.res5)\.', 'a C4 model: it has no FPN'),
    (r'roi_head\.bbox_head\.\d\.|roi_heads\.box_head\.\d\.fc', 'a Cascade R-CNN'),
    (
        r'rpn\.head\.conv\.1\.|roi_heads\.box_head\.0\.0\.',
        "torchvision's second version (v2): its heads have more layers",
    ),
    (r'(bbox_head\.retina_|head\.(cls|bbox)_subnet\.)', 'a RetinaNet'),
    (r'head\.classification_head\.', 'a RetinaNet or another one-stage detector'),
    (
        r'(\w+\.)?(transformer|encoder\.layers|decoder\.layers|query_embed|class_embed|panoptic_head|'
        r'sem_seg_head)',
        'a DETR-like model',
    ),
    (r'(model\.)+\d+\.|module_list\.|bbox_head\.multi_level_|backbone\.stem\.conv\.conv', 'a YOLO-like model'),
    (r'(bbox_head\.fc_cls|mask_head\.conv_logits)\.', 'a model of MMDetection 1.x, whose rows have another order'),
    (r'(bbox_head|mask_head)\.', 'a one-stage detector'),
    (r'backbone\.((body\.)?layer3|bottom_up\.res4)\.35\.', 'a model with ResNet-152'),
    (r'backbone\.((body\.)?layer3|bottom_up\.res4)\.22\.', 'a model with ResNet-101'),
)


def read_source(path: Path, bn_eps: float | None = None, any_model: bool = False) -> Source:
    """Read weights and bring them under MMDetection's names, without running any code of the file.

    The format (torch, numpy pickle, safetensors) is told by the content, the kind by the keys.

    A frozen BN layer computes ``w (x - mean) / sqrt(var + eps) + b``. MMDetection's eps is 1e-5,
    that of a torchvision model `bn_eps`. The difference goes into ``running_var``
    (``var + bn_eps - 1e-5``), or, for channels with so little variance that this difference
    would cancel, into the weight. Either gives the same function; :func:`to_torchvision` undoes it.

    Args:
        path: The file.
        bn_eps: Of the torchvision model that the weights were trained in. None: 0 for the file
            that torchvision released (known by its SHA-256), since torchvision runs it so; 1e-5,
            PyTorch's default, for all others. A model fine-tuned from torchvision's COCO weights
            has 0 too, but its file does not show it.
        any_model: Take other models too, as they are and of kind 'other': the first note says
            what they seem to be. For comparison with a config, which may well be of that model.

    Raises:
        UserError: Missing, damaged, unsafe, not numbers, or not a Mask R-CNN R50-FPN by its keys.
    """
    path = Path(path)
    verify_file(path)
    if bn_eps is not None and not 0 <= bn_eps < 1:
        raise UserError(f'bn_eps is {bn_eps}, which is no small number of at least 0', cure='pass 0 or 1e-5')
    loaded = load(path)
    notes: list[str] = []
    tensors = clean(named_tensors(loaded, path, notes), path, notes)
    try:
        family = _family(tensors, path)
    except UserError as error:
        if not any_model:
            raise
        family = 'other'
        notes.insert(0, error.message)
    check_finite(tensors, path)
    if bn_eps is not None and family != 'torchvision':
        raise UserError(f'bn_eps is for weights of torchvision, but {path} is of kind {family}', cure='leave it out')
    meta = loaded.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    source = Source(path, family, tensors, notes=notes)
    if family == 'torchvision':
        from_torchvision(source, bn_eps)
    elif family == 'detectron2':
        from_detectron2(source)
    elif family == 'mmdet':
        from_mmdet(source, loaded, meta)
    elif 'fc.weight' in tensors:
        source.style, source.rgb = 'pytorch', True
        source.mean, source.std = RGB_MEAN, RGB_STD
    _name_rows(source, loaded, meta)
    if meta.get('origin') in KINDS:
        _as_saved(source, loaded, meta)
    return source


def _family(keys: Mapping[str, object], path: Path) -> str:
    """Which library's names these are.

    Raises:
        UserError: None's, or those of another architecture than Mask R-CNN R50-FPN.
    """

    def refuse(what: str) -> NoReturn:
        raise UserError(f'{path} is not a Mask R-CNN R50-FPN but {what}', cure=CURE)

    for pattern, what in _OTHER_MODELS:
        key = next((k for k in keys if re.match(pattern, k)), None)
        if key:
            refuse(f'{what} (it has {key})')

    def some(*starts: str) -> bool:
        return any(k.startswith(starts) for k in keys)

    if some('backbone.body.', 'rpn.head.'):
        family, neck = 'torchvision', 'backbone.fpn.'
    elif some('backbone.bottom_up.', 'proposal_generator.'):
        family, neck = 'detectron2', 'backbone.fpn_'
    elif some('backbone.') and some('roi_head.', 'rpn_head.'):
        family, neck = 'mmdet', 'neck.'
    elif 'conv1.weight' in keys and some('layer1.0.conv1.'):
        return 'backbone'
    else:
        raise UserError(f'{path} is not a Mask R-CNN: its keys begin with {", ".join(list(keys)[:5])}', cure=CURE)
    if not some(neck):
        refuse(f'a model without an FPN (no {neck}*)')
    if not some('roi_head.mask_head.', 'roi_heads.mask_'):
        refuse('a detector without masks, such as a Faster R-CNN (it has no mask head)')
    return family


def _name_rows(source: Source, loaded: Mapping, meta: Mapping) -> None:
    """Find the names of the classes; a list of another length than the rows is not theirs."""
    head = source.tensors.get(FC_CLS + 'weight')
    if head is None:
        return
    count = len(head) - 1
    names = None
    data = meta.get('dataset_meta')
    for holder, key in ((data, 'classes'), (data, 'CLASSES'), (meta, 'CLASSES'), (loaded, 'classes')):
        value = holder.get(key) if isinstance(holder, Mapping) else None
        if isinstance(value, (list, tuple)) and value:
            names = tuple(map(str, value))
            break
    if names and len(names) != count:
        source.notes.append(f'the file names {len(names)} classes, but its head has {count}: the names are not used')
        names = None
    if names is None and count == len(COCO_CLASSES):
        names = COCO_CLASSES
        # Detectron2 keeps no names anywhere, and 91 slots with holes are COCO's for sure.
        slots = source.extra.get('slots')
        if source.kind != 'detectron2' and (slots is None or int(slots.max()) == count):
            source.notes.append("80 classes without names are taken to be COCO's")
    source.classes = names


def _as_saved(source: Source, loaded: Mapping, meta: Mapping) -> None:
    """Take what :func:`save` wrote."""
    source.kind = meta['origin']
    for name in ('style', 'rgb'):
        setattr(source, name, meta.get(name))
    for name in ('mean', 'std'):
        value = meta.get(name)
        setattr(source, name, tuple(value) if value is not None else None)
    classes = (meta.get('dataset_meta') or {}).get('classes')
    source.classes = tuple(classes) if classes else None
    source.notes = list(meta.get('notes', ()))
    extra = loaded.get('extra')
    source.extra = dict(extra) if isinstance(extra, Mapping) else {}
