"""Data transforms, and the coordinates of ground truth."""

from __future__ import annotations

from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmfinetune.utils.errors import UserError


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
