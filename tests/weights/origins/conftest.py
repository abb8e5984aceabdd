"""The model that weights of any origin must fill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def coco_model(voc_cfg) -> Callable:
    """Builds MMDetection's 80-class model; `voc_cfg` has registered all parts."""
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config

    base = Path(mmdet.__file__).parent / '.mim/configs/_base_/models/mask-rcnn_r50_fpn.py'
    cfg = Config.fromfile(base).model
    cfg.backbone.init_cfg = None
    cfg['_scope_'] = 'mmdet'
    for extractor in ('bbox_roi_extractor', 'mask_roi_extractor'):
        cfg.roi_head[extractor].roi_layer.update(sampling_ratio=2, aligned=False)
    return lambda: MODELS.build(copy.deepcopy(cfg)).eval()
