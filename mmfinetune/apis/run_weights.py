"""The weights of a run: found, verified, read and compared with its model once, and handed on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config import views
from mmfinetune.config.resolve import set_roi_align
from mmfinetune.utils.dist import say
from mmfinetune.utils.errors import Message
from mmfinetune.weights import check, find, sources
from mmfinetune.weights.origins import torchvision

if TYPE_CHECKING:
    from mmengine.config import Config


def start_of(cfg: Config) -> check.WeightCheck:
    """What training starts from: the file of the config's ``weights``, and the plan for it.

    Raises:
        UserError: The file is not available or cannot be read, or ``weights`` is wrong.
    """
    return _compare(cfg, find.locate(cfg.weights), cfg.weights)


def checkpoint_of(cfg: Config, file: Path) -> check.WeightCheck:
    """A checkpoint of the config's whole model, which pools regions as the model in the file does.

    Args:
        cfg: Changed in place.
        file: The checkpoint.

    Raises:
        UserError: The file does not exist, cannot be read, or does not fit the model.
    """
    checked = _compare(cfg, file, {})
    checked.require_good()
    if checked.source.origin == torchvision.ORIGIN.name and set_roi_align(cfg):
        say(f'note: {Message("weights-roi-align-set", path=file)}', aside=True)
    return checked


def _compare(cfg: Config, file: Path, weights_cfg: Mapping) -> check.WeightCheck:
    from mmengine.registry import init_default_scope

    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return check.compare(cfg.model, sources.open_source(file, any_model=True), weights_cfg, views.class_names(cfg))
