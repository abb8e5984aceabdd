"""Detectron2's Mask R-CNN weights under MMDetection's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmfinetune.weights.source import BGR_MEAN, FC_CLS, FC_REG, MASK_LOGITS, ONES, Origin, Source, rename_all

_NAMES = {
    'backbone.bottom_up.stem.conv1.norm.': 'backbone.bn1.',
    'backbone.bottom_up.stem.conv1.': 'backbone.conv1.',
    **{
        f'backbone.bottom_up.res{s + 1}.{i}.{theirs}': f'backbone.layer{s}.{i}.{ours}'
        for s, blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
        for i in range(blocks)
        for theirs, ours in (
            *((f'conv{k}.norm.', f'bn{k}.') for k in (1, 2, 3)),
            *((f'conv{k}.', f'conv{k}.') for k in (1, 2, 3)),
            ('shortcut.norm.', 'downsample.1.'),
            ('shortcut.', 'downsample.0.'),
        )
    },
    **{f'backbone.fpn_lateral{i + 2}.': f'neck.lateral_convs.{i}.conv.' for i in range(4)},
    **{f'backbone.fpn_output{i + 2}.': f'neck.fpn_convs.{i}.conv.' for i in range(4)},
    'proposal_generator.rpn_head.conv.': 'rpn_head.rpn_conv.',
    'proposal_generator.rpn_head.objectness_logits.': 'rpn_head.rpn_cls.',
    'proposal_generator.rpn_head.anchor_deltas.': 'rpn_head.rpn_reg.',
    'roi_heads.box_head.fc1.': 'roi_head.bbox_head.shared_fcs.0.',
    'roi_heads.box_head.fc2.': 'roi_head.bbox_head.shared_fcs.1.',
    'roi_heads.box_predictor.cls_score.': FC_CLS,
    'roi_heads.box_predictor.bbox_pred.': FC_REG,
    **{f'roi_heads.mask_head.mask_fcn{i + 1}.': f'roi_head.mask_head.convs.{i}.conv.' for i in range(4)},
    'roi_heads.mask_head.deconv.': 'roi_head.mask_head.upsample.',
    'roi_heads.mask_head.predictor.': MASK_LOGITS,
}
# What Detectron2's files hold besides weights: statistics of the inputs, and anchors.
_NO_WEIGHTS = re.compile(r'^pixel_(mean|std)$|\.anchor_generator\.')


def _convert(source: Source, _loaded: Mapping, _bn_eps: float | None) -> None:
    given = {k: source.tensors.pop(k) for k in list(source.tensors) if _NO_WEIGHTS.search(k)}
    if given:
        source.note('weights-left-out', keys=', '.join(given))
    source.tensors = rename_all(source, _NAMES)
    source.style, source.rgb, source.mean, source.std = 'caffe', False, BGR_MEAN, ONES
    if [given[k].numel() for k in ('pixel_mean', 'pixel_std') if k in given] == [3, 3]:
        # Rounded, since fp32 has 103.53 as 103.52999877929688.
        mean, std = (tuple(round(x, 4) for x in given[k].flatten().tolist()) for k in ('pixel_mean', 'pixel_std'))
        source.mean, source.std, source.rgb = mean, std, mean[0] > mean[-1]
        if std != ONES:
            # Detectron2 has the torchvision backbone's stride and statistics together.
            source.style = 'pytorch'
    else:
        source.note('weights-detectron2-zoo')


ORIGIN = Origin('detectron2', (('backbone.bottom_up.', 'proposal_generator.'),), _convert, neck='backbone.fpn_')
