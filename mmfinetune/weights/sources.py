"""Open weights of any origin: verified, read and brought under MMDetection's names, once.

Nothing here builds a model: names, rows and BN numbers are all that differ between the libraries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmfinetune.utils.errors import Message, UserError
from mmfinetune.weights import read
from mmfinetune.weights.find import verify_file
from mmfinetune.weights.origins import backbone, detectron2, mmdet, torchvision
from mmfinetune.weights.read import USE_OURS
from mmfinetune.weights.source import COCO_COUNT, FC_CLS, Origin, Source, coco_classes

# The first whose names fit is taken. A new origin is a file in origins/ and an entry here.
FAMILIES = (torchvision.ORIGIN, detectron2.ORIGIN, mmdet.ORIGIN, backbone.ORIGIN)
OTHER = Origin('other', (), lambda *_: None)

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


def open_source(path: Path | str, bn_eps: float | None = None, any_model: bool = False) -> Source:
    """Verify and read weights and bring them under MMDetection's names; no code in the file runs.

    The format (torch, numpy pickle, safetensors) is known by the content, the origin by the keys.

    A frozen BN layer computes ``w (x - mean) / sqrt(var + eps) + b``. MMDetection's eps is 1e-5,
    that of a torchvision model `bn_eps`. The difference goes into ``running_var``
    (``var + bn_eps - 1e-5``), or, for channels with so little variance that this difference
    would cancel, into the weight. Either gives the same function, and can be undone.

    Args:
        path: The file.
        bn_eps: Eps of BN in the torchvision model that the weights were trained in. None: 0 for
            the file that torchvision released (known by its SHA-256), since torchvision runs it
            so; 1e-5, PyTorch's default, for all others. A model fine-tuned from torchvision's COCO
            weights has 0 too, but its file does not show it.
        any_model: Accept other models too, unchanged and of origin 'other': the first note says
            what they seem to be. For comparison with a config, which may be of that model.

    Raises:
        UserError: Missing, damaged, unsafe, not numbers, or not a Mask R-CNN R50-FPN by its keys.
    """
    path = Path(path)
    sha256 = verify_file(path)
    if bn_eps is not None and not 0 <= bn_eps < 1:
        raise UserError('weights-eps', eps=bn_eps)
    loaded = read.load(path)
    notes: list[Message] = []
    tensors = read.clean(read.state_dict_of(loaded, path, notes), notes)
    try:
        origin = _origin_of(tensors, path)
    except UserError as error:
        if not any_model:
            raise
        origin = OTHER
        notes.insert(0, error.message)
    read.check_finite(tensors, path)
    if bn_eps is not None and origin is not torchvision.ORIGIN:
        raise UserError('weights-eps-origin', origin=origin.name)
    source = Source(path, origin.name, tensors, sha256, notes=notes)
    origin.convert(source, loaded, bn_eps)
    meta = loaded.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    if meta.get('origin') in ('mmdet run', OTHER.name, *(family.name for family in FAMILIES)):
        try:
            _restore(source, loaded, meta)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError('weights-record', path=path, reason=error) from None
    else:
        _name_rows(source, loaded)
    return source


def _origin_of(keys: Mapping[str, object], path: Path) -> Origin:
    """Which library's names these are.

    Raises:
        UserError: None's, or those of another architecture than Mask R-CNN R50-FPN.
    """

    def refused(model: str) -> UserError:
        return UserError('weights-other-model', hint=USE_OURS, path=path, model=model)

    for pattern, model in _OTHER_MODELS:
        key = next((k for k in keys if re.match(pattern, k)), None)
        if key:
            raise refused(f'{model} (it has {key})')
    origin = next((family for family in FAMILIES if family.fits(keys)), None)
    if origin is None:
        raise UserError('weights-no-mask-rcnn', hint=USE_OURS, path=path, keys=', '.join(list(keys)[:5]))
    if origin.neck is not None:
        if not any(key.startswith(origin.neck) for key in keys):
            raise refused(f'a model without an FPN (no {origin.neck}*)')
        if not any(key.startswith(('roi_head.mask_head.', 'roi_heads.mask_')) for key in keys):
            raise refused('a detector without masks, such as a Faster R-CNN (it has no mask head)')
    return origin


def _name_rows(source: Source, loaded: Mapping) -> None:
    """Find the names of the classes; a list of another length than the rows is not theirs."""
    head = source.tensors.get(FC_CLS + 'weight')
    if head is None or not head.dim():
        return
    count = len(head) - 1
    names = read.recorded_classes(loaded) or None
    if names and len(names) != count:
        source.note('weights-names-unused', named=len(names), rows=count)
        names = None
    if names is None and count == COCO_COUNT:
        names = coco_classes()
        # Detectron2 keeps no names anywhere, and 91 slots with holes are COCO's for sure.
        slots = source.extra.get('slots')
        if source.origin != detectron2.ORIGIN.name and (slots is None or int(slots.max()) == count):
            source.note('weights-coco-assumed')
    source.classes = names


def _restore(source: Source, loaded: Mapping, meta: Mapping) -> None:
    """Take over what ``publish.save`` wrote."""
    import torch

    source.origin = meta['origin']
    source.style, source.rgb = meta.get('style'), meta.get('rgb')
    if source.style not in (None, 'pytorch', 'caffe') or not isinstance(source.rgb, (bool, type(None))):
        raise ValueError('style or rgb')
    source.mean, source.std = (_statistics(meta[k]) if meta.get(k) is not None else None for k in ('mean', 'std'))
    source.classes = read.recorded_classes(loaded) or None
    source.notes.clear()
    for note in meta.get('notes', ()):
        if isinstance(note, str):  # a file of an earlier release
            source.note('weights-note', note=note)
        else:
            code, text = map(str, note)
            source.notes.append(Message(code, text))
    extra = loaded.get('extra')
    source.extra = dict(extra) if isinstance(extra, Mapping) else {}
    if not all(isinstance(tensor, torch.Tensor) for tensor in source.extra.values()):
        raise ValueError('extra')


def _statistics(values: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError('mean or std')
    return tuple(map(float, values))
