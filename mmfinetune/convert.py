"""Weights of other origins under MMDetection's names, and the way back.

Nothing here builds a model: names, rows and BN numbers are all that differ between the libraries.
"""

from __future__ import annotations

import ast
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mmfinetune.checkpoint import hash_in_name, verify_file
from mmfinetune.classes import COCO_CLASSES
from mmfinetune.errors import UserError
from mmfinetune.files import atomic_write_bytes
from mmfinetune.torchvision_weights import (
    BN_EPS,
    FC_CLS,
    FC_REG,
    MASK_LOGITS,
    RGB_MEAN,
    RGB_STD,
    from_torchvision,
    renamed,
    to_torchvision,
)
from mmfinetune.weight_files import CURE, check_finite, clean, load, named_tensors

if TYPE_CHECKING:
    import torch

KINDS = ('mmdet', 'mmdet run', 'torchvision', 'detectron2', 'backbone', 'other')
BGR_MEAN, ONES = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)

_DETECTRON2 = {
    'backbone.bottom_up.stem.conv1.norm.': 'backbone.bn1.',
    'backbone.bottom_up.stem.conv1.': 'backbone.conv1.',
    **{f'backbone.bottom_up.res{s + 1}.{i}.{theirs}': f'backbone.layer{s}.{i}.{ours}'
       for s, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(blocks)
       for theirs, ours in (('conv1.norm.', 'bn1.'), ('conv2.norm.', 'bn2.'),
                            ('conv3.norm.', 'bn3.'), ('conv1.', 'conv1.'), ('conv2.', 'conv2.'),
                            ('conv3.', 'conv3.'), ('shortcut.norm.', 'downsample.1.'),
                            ('shortcut.', 'downsample.0.'))},
    **{f'backbone.fpn_lateral{i + 2}.': f'neck.lateral_convs.{i}.conv.' for i in range(4)},
    **{f'backbone.fpn_output{i + 2}.': f'neck.fpn_convs.{i}.conv.' for i in range(4)},
    'proposal_generator.rpn_head.conv.': 'rpn_head.rpn_conv.',
    'proposal_generator.rpn_head.objectness_logits.': 'rpn_head.rpn_cls.',
    'proposal_generator.rpn_head.anchor_deltas.': 'rpn_head.rpn_reg.',
    'roi_heads.box_head.fc1.': 'roi_head.bbox_head.shared_fcs.0.',
    'roi_heads.box_head.fc2.': 'roi_head.bbox_head.shared_fcs.1.',
    'roi_heads.box_predictor.cls_score.': FC_CLS,
    'roi_heads.box_predictor.bbox_pred.': FC_REG,
    **{f'roi_heads.mask_head.mask_fcn{i + 1}.': f'roi_head.mask_head.convs.{i}.conv.'
       for i in range(4)},
    'roi_heads.mask_head.deconv.': 'roi_head.mask_head.upsample.',
    'roi_heads.mask_head.predictor.': MASK_LOGITS,
}
# What Detectron2 files hold besides weights: inputs' statistics and anchors.
_NO_WEIGHTS = re.compile(r'^pixel_(mean|std)$|\.anchor_generator\.')

# The first that fits a key names the architecture, so the special come before the general.
_OTHER_MODELS = (
    (r'(roi_head\.shared_head|roi_heads\.res5)\.', 'a C4 model: it has no FPN'),
    (r'roi_head\.bbox_head\.\d\.|roi_heads\.box_head\.\d\.fc', 'a Cascade R-CNN'),
    (r'rpn\.head\.conv\.1\.|roi_heads\.box_head\.0\.0\.',
     "torchvision's second version (v2): its heads have more layers"),
    (r'(bbox_head\.retina_|head\.(cls|bbox)_subnet\.)', 'a RetinaNet'),
    (r'head\.classification_head\.', 'a RetinaNet or another one-stage detector'),
    (r'(\w+\.)?(transformer|encoder\.layers|decoder\.layers|query_embed|class_embed|panoptic_head|'
     r'sem_seg_head)', 'a DETR-like model'),
    (r'(model\.)+\d+\.|module_list\.|bbox_head\.multi_level_|backbone\.stem\.conv\.conv',
     'a YOLO-like model'),
    (r'(bbox_head\.fc_cls|mask_head\.conv_logits)\.',
     'a model of MMDetection 1.x, whose rows have another order'),
    (r'(bbox_head|mask_head)\.', 'a one-stage detector'),
    (r'backbone\.((body\.)?layer3|bottom_up\.res4)\.35\.', 'a model with ResNet-152'),
    (r'backbone\.((body\.)?layer3|bottom_up\.res4)\.22\.', 'a model with ResNet-101'),
)



@dataclass(eq=False)
class Source:
    """Weights of any supported origin under MMDetection's names.

    Attributes:
        path: The file.
        kind: One of `KINDS`. A 'backbone' is a classification ResNet; its names stay as they
            are, and so do those of 'other' models.
        tensors: On the CPU, fp32 (BN's counts are int64). The rows of ``fc_cls`` are the classes
            and then the background.
        classes: Names of the rows; None where nothing tells them.
        style: 'pytorch' (stride in the 3x3 convolution) or 'caffe' (in the first 1x1); None where
            it cannot be told.
        mean: Subtracted from inputs of 0..255, in the channel order of conv1's weights.
        std: The inputs are then divided by it.
        rgb: Whether that order is RGB.
        extra: What MMDetection has no place for, so that :func:`to_torchvision` is exact:
            ``slots`` (slot of each class), rows of the other slots by their torchvision name,
            ``bn_eps``, and under ``bn.`` BN's numbers before they were folded.
        notes: What was changed or assumed, one sentence each.
    """

    path: Path
    kind: str
    tensors: dict[str, torch.Tensor]
    classes: tuple[str, ...] | None = None
    style: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rgb: bool | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: what the weights are and what was done to them."""
        norm = 'not told by the file'
        if self.mean is not None and self.std is not None:
            order = {True: 'RGB', False: 'BGR', None: 'channel order unknown'}[self.rgb]
            norm = f'{order}, mean {list(self.mean)}, std {list(self.std)}'
        names = 'not told by the file'
        if self.classes:
            names = f'{len(self.classes)}: {", ".join(self.classes[:3])}'
            names += ', …' if len(self.classes) > 3 else ''
        numbers = sum(t.numel() for t in self.tensors.values())
        return [f'source:        {self.path}', f'kind:          {self.kind}',
                f'tensors:       {len(self.tensors)} ({numbers:,} numbers)',
                f'classes:       {names}', f'style:         {self.style or "not told by the file"}',
                f'normalisation: {norm}', *(f'note:          {note}' for note in self.notes)]


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
        raise UserError(f'bn_eps is {bn_eps}, which is no small number of at least 0',
                        cure='pass 0 or 1e-5')
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
        raise UserError(f'bn_eps is for weights of torchvision, but {path} is of kind {family}',
                        cure='leave it out')
    meta = loaded.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    source = Source(path, family, tensors, notes=notes)
    if family == 'torchvision':
        from_torchvision(source, bn_eps)
    elif family == 'detectron2':
        _from_detectron2(source)
    elif family == 'mmdet':
        _from_mmdet(source, loaded, meta)
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
        raise UserError(f'{path} is not a Mask R-CNN: its keys begin with '
                        f'{", ".join(list(keys)[:5])}', cure=CURE)
    if not some(neck):
        refuse(f'a model without an FPN (no {neck}*)')
    if not some('roi_head.mask_head.', 'roi_heads.mask_'):
        refuse('a detector without masks, such as a Faster R-CNN (it has no mask head)')
    return family


# --- The kinds -------------------------------------------------------------------------------

def _from_detectron2(source: Source) -> None:
    given = {k: source.tensors.pop(k) for k in list(source.tensors) if _NO_WEIGHTS.search(k)}
    if given:
        source.notes.append(f'left out, as they are no weights: {", ".join(given)}')
    source.tensors = renamed(source, _DETECTRON2)
    source.style, source.rgb, source.mean, source.std = 'caffe', False, BGR_MEAN, ONES
    if 'pixel_mean' in given and 'pixel_std' in given:
        # Rounded, since fp32 has 103.53 as 103.52999877929688.
        mean, std = (tuple(round(x, 4) for x in given[k].flatten().tolist())
                     for k in ('pixel_mean', 'pixel_std'))
        source.mean, source.std, source.rgb = mean, std, mean[0] > mean[-1]
        if std != ONES:
            # Detectron2 has the torchvision backbone's stride and statistics together.
            source.style = 'pytorch'
    else:
        source.notes.append("style and normalisation are those of Detectron2's model zoo; the file "
                            'does not tell them')


def _from_mmdet(source: Source, loaded: Mapping, meta: Mapping) -> None:
    if 'optimizer' in loaded or 'message_hub' in loaded:
        source.kind = 'mmdet run'
    text = meta.get('cfg') or meta.get('config')  # 3.x, 2.x
    for told in _dicts(text if isinstance(text, str) else ''):
        if source.style is None and 'depth' in told and told.get('style') in ('pytorch', 'caffe'):
            source.style = told['style']
        if source.mean is None and {'mean', 'std'} <= set(told):
            try:
                source.mean, source.std = (tuple(map(float, told[k])) for k in ('mean', 'std'))
            except (TypeError, ValueError):
                continue
            # BGR is what cv2 reads; 2.x says to_rgb, 3.x bgr_to_rgb.
            source.rgb = bool(told.get('to_rgb', told.get('bgr_to_rgb', False)))
    if source.style is None and '_caffe_' in source.path.name:
        source.style = 'caffe'
        source.notes.append("style 'caffe' is told by the file name only")


def _dicts(text: str) -> Iterator[dict]:
    """All dicts in the text of a config, with what is literal in them; nothing is run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
            pairs = [(k.arg, k.value) for k in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True)
                     if isinstance(k, ast.Constant)]
        found = {}
        for key, value in pairs:
            try:
                found[key] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, RecursionError):
                found[key] = None
        yield found


def _name_rows(source: Source, loaded: Mapping, meta: Mapping) -> None:
    """Find the names of the classes; a list of another length than the rows is not theirs."""
    head = source.tensors.get(FC_CLS + 'weight')
    if head is None:
        return
    count = len(head) - 1
    names = None
    data = meta.get('dataset_meta')
    for holder, key in ((data, 'classes'), (data, 'CLASSES'), (meta, 'CLASSES'),
                        (loaded, 'classes')):
        value = holder.get(key) if isinstance(holder, Mapping) else None
        if isinstance(value, (list, tuple)) and value:
            names = tuple(map(str, value))
            break
    if names and len(names) != count:
        source.notes.append(f'the file names {len(names)} classes, but its head has {count}: '
                            'the names are not used')
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


# --- Back and out ----------------------------------------------------------------------------

def _check_target(dst: Path) -> None:
    if dst.exists():
        raise UserError(f'{dst} exists and is not overwritten',
                        cure='choose another name, or move it away')
    if dst.suffix not in ('.pth', '.pt'):
        raise UserError(f'{dst}: the result is a torch file, so its name must end in .pth',
                        cure=f'write {dst.with_suffix(".pth")}')
    if hash_in_name(dst):
        raise UserError(f'{dst}: a name that ends in a hash says what is in the file, and this '
                        'file will have another', cure='choose a name without it')


def _write(value: object, dst: Path) -> Path:
    import torch
    _check_target(dst)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    atomic_write_bytes(dst, buffer.getvalue())
    return dst


def save(source: Source, dst: Path) -> Path:
    """Write as MMDetection does; :func:`read_source` gives the same source again.

    Args:
        source: What to write.
        dst: Must not exist; ends in .pth and has no hash in its name.

    Raises:
        UserError: `dst` exists, has another name, or cannot be written.
    """
    meta = {'dataset_meta': {'classes': source.classes} if source.classes else {},
            'style': source.style, 'mean': source.mean, 'std': source.std, 'rgb': source.rgb,
            'origin': source.kind, 'notes': list(source.notes)}
    # Copies, since torch writes all of the memory that a view is a part of.
    return _write({'meta': meta, 'state_dict': {k: v.clone() for k, v in source.tensors.items()},
                   'extra': {k: v.clone() for k, v in source.extra.items()}}, Path(dst))


def convert_file(src: Path, dst: Path, to: str = 'mmdet', bn_eps: float | None = None) -> Source:
    """Read `src`, write `dst`.

    Args:
        src: Weights of any supported origin.
        dst: See :func:`save`.
        to: 'mmdet', or 'torchvision' for a plain state dict of its ``maskrcnn_resnet50_fpn``.
        bn_eps: See :func:`read_source`.

    Returns:
        What was read; its notes include those on the writing.

    Raises:
        UserError: See :func:`read_source` and :func:`save`; or torchvision has no such model.
    """
    _check_target(Path(dst))  # before the reading, which takes a while
    source = read_source(src, bn_eps)
    if to == 'mmdet':
        save(source, dst)
        return source
    if source.kind == 'backbone':
        raise UserError(f'{src} is a backbone alone, not a Mask R-CNN', cure=CURE)
    if source.style == 'caffe' or source.rgb is False:
        raise UserError(
            f'{src} cannot become a torchvision model: it is of style {source.style}, fed with '
            f'{"BGR" if source.rgb is False else "RGB"}, and torchvision has the stride in the '
            '3x3 convolutions and RGB', cure='use weights in pytorch style')
    if source.style is None or source.rgb is None:
        source.notes.append('the file does not tell style and channel order: torchvision needs '
                            'pytorch style and RGB')
    if source.mean is not None and not all(
            math.isclose(a, b, abs_tol=0.01) for a, b in
            zip(source.mean + source.std, RGB_MEAN + RGB_STD, strict=True)):
        source.notes.append(f'the weights expect mean {source.mean}, std {source.std}: give '
                            "torchvision's model these / 255 as image_mean and image_std")
    coco = None if source.classes is None else source.classes == COCO_CLASSES
    eps = float(source.extra.get('bn_eps', BN_EPS))
    _write(to_torchvision(source.tensors, source.extra, coco), Path(dst))
    source.notes.append(f'in torchvision BN must run with eps {eps:g}'
                        + ('' if eps == BN_EPS else
                           f': torchvision.models.detection._utils.overwrite_eps(model, {eps:g})'))
    return source
