"""Pictures of ground truth and prediction, and the hook that draws those of the test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.structures import InstanceData

from mmfinetune.data.drawing import contact_sheet, draw_instances, side_by_side
from mmfinetune.engine.transforms import scaled_truth
from mmfinetune.evaluation.stats import SCORE_THR
from mmfinetune.utils.files import atomic_write_bytes

# Of the grid of a batch: long side of a cell in px, and number of cells.
_CELL, _BATCH = 480, 8


def truth_and_prediction(
    sample: DetDataSample, names: Sequence[str], score_thr: float, limit: int | None = None
) -> np.ndarray:
    """The image of a predicted sample twice; only the prediction where its annotations are not known.

    Args:
        sample: With ``img_path``, ``pred_instances`` and, if known, ``gt_instances``.
        names: Classes in label order.
        score_thr: Predictions below this score are not drawn.
        limit: Longest side of each picture in pixels.

    Returns:
        (H, W, 3) RGB uint8.
    """
    image = mmcv.imread(sample.img_path, channel_order='rgb')
    found = sample.pred_instances
    panels = [_drawn(image, found[found.scores >= score_thr], names, limit)]
    titles = ['prediction']
    if 'bboxes' in sample.get('gt_instances', ()):
        panels.insert(0, _drawn(image, scaled_truth(sample, sample.ori_shape[:2]), names, limit))
        titles.insert(0, 'ground truth')
    return side_by_side(*panels, titles=titles)


def batch_picture(batch: Mapping[str, Any], names: Sequence[str], preprocessor: Mapping[str, Any]) -> np.ndarray:
    """The first images of a batch in a grid, with the objects that the model learns from.

    Args:
        batch: ``inputs``, (N, 3, H, W) as the model gets them, normalized and padded, and ``data_samples`` with
            ``gt_instances`` in the same coordinates.
        names: Classes in label order.
        preprocessor: Config of the model's data preprocessor: ``mean`` and ``std`` by channel, ``bgr_to_rgb``.

    Returns:
        (H, W, 3) RGB uint8.
    """
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    cells = []
    for tensor, sample in zip(batch['inputs'][:_BATCH], batch['data_samples'], strict=False):
        image = tensor.detach().float().cpu().numpy().transpose(1, 2, 0)
        if mean is not None and std is not None:
            image = image * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
        image = image.round().clip(0, 255).astype(np.uint8)
        image = image if preprocessor.get('bgr_to_rgb') else image[..., ::-1]
        cells.append(_drawn(image, sample.gt_instances, names, _CELL))
    return contact_sheet(cells, width=_CELL)


def _drawn(image: np.ndarray, instances: InstanceData, names: Sequence[str], limit: int | None) -> np.ndarray:
    """An image with instances, made smaller first so that lines and text stay readable."""
    names_of = {'bboxes': 'boxes', 'labels': 'labels', 'scores': 'scores', 'masks': 'masks'}
    parts: dict[str, Any] = {name: _array(instances[key]) for key, name in names_of.items() if key in instances}
    height, width = image.shape[:2]
    factor = (limit or math.inf) / max(height, width)
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
        parts['boxes'] = parts['boxes'] * factor
        if 'masks' in parts:
            masks = [cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for m in parts['masks']]
            parts['masks'] = np.array(masks, bool).reshape(-1, *size[::-1])
    return draw_instances(image, **parts, names=names)


def _array(value: Any) -> np.ndarray:
    """Numbers of tensors, mmdet's boxes and mmdet's masks."""
    if hasattr(value, 'to_ndarray'):
        return value.to_ndarray().astype(bool)
    return getattr(value, 'tensor', value).detach().cpu().numpy()


def spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` of the numbers below ``count``, as far apart as they can be."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


class Picker:
    """Picks samples by their places in the data set, from 0, and names their pictures."""

    def __init__(self, places: Iterable[int]) -> None:
        self._places, self._seen = set(places), 0
        self._names: set[str] = set()

    def pick(self, outputs: Sequence[DetDataSample] | None) -> Iterator[tuple[str, DetDataSample]]:
        """The samples of the next batch to draw, each with a name of its own."""
        for place, sample in enumerate(outputs or (), self._seen):
            self._seen += 1
            if place in self._places:
                stem = Path(sample.img_path).stem
                name = f'{stem}_{sample.img_id}' if stem in self._names else stem
                self._names.add(name)
                yield name, sample


def class_names(runner) -> Sequence[str]:
    """The classes of a run's data set in label order."""
    return (runner.visualizer.dataset_meta or {}).get('classes') or ()


@HOOKS.register_module()
class TestPicturesHook(Hook):
    """Draws the first test images, ground truth next to prediction, to ``<work_dir>/figures``.

    Args:
        num_images: How many; 0 draws none.
        score_thr: Predictions below this score are not drawn.
    """

    def __init__(self, num_images: int = 8, score_thr: float = SCORE_THR) -> None:
        self.num_images = num_images
        self.score_thr = score_thr
        self._picker = Picker(())

    def before_test(self, runner) -> None:
        self._picker = Picker(range(self.num_images) if is_main_process() else ())

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for name, sample in self._picker.pick(outputs):
            picture = truth_and_prediction(sample, class_names(runner), self.score_thr)
            _, png = cv2.imencode('.png', picture[..., ::-1])
            atomic_write_bytes(Path(runner.work_dir) / 'figures' / f'{name}.png', png.tobytes())
