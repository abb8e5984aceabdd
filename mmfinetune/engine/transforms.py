"""Data transforms, and the coordinates of ground truth."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mmcv.transforms import Compose, LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmfinetune.engine.training_dataset import random_state_kept, seed_everything
from mmfinetune.utils.building import building
from mmfinetune.utils.errors import UserError

_DRAWS = 4  # of random transforms
_USUAL = (640, 480)


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """``LoadImageFromFile`` that raises a UserError with the path when an image is missing or does not decode."""

    def transform(self, results: dict) -> dict | None:
        try:
            loaded = super().transform(results)
            if loaded is not None and loaded['img'] is None:
                raise ValueError('not an image')
        except Exception as error:
            # OpenCV, Pillow and the file backends raise whatever they like here.
            why = str(error) or type(error).__name__
            raise UserError('image-unreadable-in-training', path=results.get('img_path'), why=why) from None
        return loaded


def from_memory(pipeline: Sequence[Any]) -> tuple[Any, list[Any]] | None:
    """The step of a pipeline that reads a file, and all steps for an image in memory; None if there is no such step."""
    steps = copy.deepcopy(list(pipeline))
    names = [getattr(step['type'], '__name__', str(step['type'])).rpartition('.')[2] for step in steps]
    reading = [i for i, name in enumerate(names) if name.startswith('LoadImage')]
    if len(reading) != 1:
        return None
    loader = steps[reading[0]]
    steps[reading[0]] = dict(type='mmdet.LoadImageFromNDArray', to_float32=loader.get('to_float32', False))
    return loader, steps


def unfit_sizes(pipeline: Sequence[Any], sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The sizes (width, height) of images that a pipeline cannot process, and why.

    It is run, since only the transforms know: an image of one row, say, has none left when its long side is made
    smaller. A pipeline that cannot process any image in memory is not judged.
    """
    found = from_memory(pipeline)
    if not found:
        return {}
    init_default_scope('mmdet')
    with building('pipeline'):
        steps = Compose(found[1])
    sizes = list(sizes)
    reasons = {size: reason for size in sizes if (reason := _why_not(steps, *size))}
    return {} if len(reasons) == len(sizes) and _why_not(steps, *_USUAL) else reasons


def _why_not(steps: Compose, width: int, height: int) -> str:
    """Why an image of this size with one object in all of it cannot be processed; empty if it can."""
    outline = [0, 0, width, 0, width, height, 0, height]
    instance = {'bbox': [0, 0, width, height], 'bbox_label': 0, 'ignore_flag': 0, 'mask': [outline]}
    with random_state_kept():
        for draw in range(_DRAWS):
            seed_everything(draw)
            image = np.zeros((height, width, 3), np.uint8)
            try:
                done = steps({'img': image, 'img_id': 0, 'height': height, 'width': width, 'instances': [instance]})
            # Transforms and OpenCV raise whatever they like.
            except Exception as error:
                # OpenCV begins with its version and the line of its source.
                return re.sub(r'^OpenCV\S+ \S+ error: ', '', ' '.join(str(error).split())) or type(error).__name__
            inputs = done and done.get('inputs')
            if inputs is not None and not all(inputs.shape):
                return f'nothing is left of it: {tuple(inputs.shape)}'
    return ''


def scaled_truth(sample: DetDataSample, shape: tuple[int, int], name: str = 'gt_instances') -> InstanceData:
    """The ground truth of a sample in coordinates of the original image, or of the network's input.

    A test pipeline loads annotations after ``Resize``, so that they stay in the coordinates of the original image;
    other pipelines scale them. The masks say which of the two they are; without masks they are not scaled.

    Args:
        sample: With the metainfo ``ori_shape``, ``img_shape`` and ``scale_factor``.
        shape: Height and width in px of the image whose coordinates are wanted: ``ori_shape`` or ``img_shape``.

    Returns:
        A copy with boxes (x0, y0, x1, y1) in px as a tensor and masks of that size.
    """
    truth = sample.get(name).clone()
    masks = truth.get('masks')
    now = (masks.height, masks.width) if masks is not None else tuple(sample.ori_shape[:2])
    if now == tuple(shape):
        return truth
    boxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
    factor = boxes.new_tensor(sample.scale_factor).repeat(2)
    boxes = boxes / factor if tuple(shape) == tuple(sample.ori_shape[:2]) else boxes * factor
    height, width = shape
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    truth.bboxes = boxes
    if masks is not None:
        truth.masks = masks.resize(shape)
    return truth
