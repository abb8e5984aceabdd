"""Small images with one object, as a pipeline and a model give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData
from PIL import Image

NAMES = ('cat', 'dog')
HEIGHT, WIDTH = 40, 60
BOX = (10, 6, 30, 26)
GREY, RED = (90, 90, 90), (200, 20, 20)


def box_mask(box=BOX, shape=(HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros((1, *shape), np.uint8)
    mask[0, box[1] : box[3], box[0] : box[2]] = 1
    return mask


def sample(path: Path, truth: bool = True, found: bool = True, scale: float = 1.0, img_id: int = 1) -> DetDataSample:
    """A predicted image with one cat; its ground truth in the coordinates of a scaled one."""
    if not path.exists():
        Image.new('RGB', (WIDTH, HEIGHT), GREY).save(path)
    shape = round(HEIGHT * scale), round(WIDTH * scale)
    result = DetDataSample(
        metainfo={
            'img_path': str(path),
            'img_id': img_id,
            'ori_shape': (HEIGHT, WIDTH),
            'img_shape': shape,
            'scale_factor': (scale, scale),
        }
    )
    count = int(found)
    result.pred_instances = InstanceData(
        bboxes=torch.tensor([BOX], dtype=torch.float)[:count],
        labels=torch.tensor([0])[:count],
        scores=torch.tensor([0.9])[:count],
        masks=torch.from_numpy(box_mask().astype(bool))[:count],
    )
    result.gt_instances = InstanceData()
    if truth:
        scaled = [round(v * scale) for v in BOX]
        result.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([scaled], dtype=torch.float)),
            labels=torch.tensor([0]),
            masks=BitmapMasks(box_mask(scaled, shape), *shape),
        )
    return result


def batch(count: int, masks: str = 'bitmap') -> tuple[list[torch.Tensor], list[DetDataSample]]:
    """Images as a training pipeline gives them, BGR, each red with an object, of several sizes."""
    inputs, samples = [], []
    for i in range(count):
        shape = HEIGHT, WIDTH - 10 * (i % 2)
        inputs.append(torch.tensor(RED[::-1], dtype=torch.uint8)[:, None, None].expand(3, *shape).clone())
        made = DetDataSample(metainfo={'img_shape': shape})
        objects = BitmapMasks(box_mask(shape=shape), *shape)
        if masks == 'polygon':
            x0, y0, x1, y1 = BOX
            objects = PolygonMasks([[np.array([x0, y0, x1, y0, x1, y1, x0, y1], float)]], *shape)
        made.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([BOX], dtype=torch.float)), labels=torch.tensor([1]), masks=objects
        )
        samples.append(made)
    return inputs, samples


NORMALISED = {'mean': [123.675, 116.28, 103.53], 'std': [58.395, 57.12, 57.375]}
