"""Hooks that draw: validation images and a training batch for TensorBoard, pictures of the test."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.structures import InstanceData

from mmfinetune.data.drawing import contact_sheet, draw_instances, side_by_side
from mmfinetune.engine import board
from mmfinetune.engine.vis_backends import board_of, validation_step
from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.files import atomic_write_bytes

# Long sides in pixels: what a screen shows of two pictures beside each other, or of a grid.
_PAIR, _CELL = 800, 480
_BATCH = 8


def truth_and_prediction(
    sample: DetDataSample, names: Sequence[str], score_thr: float, limit: int | None = None
) -> np.ndarray:
    """The image of a predicted sample twice; once where its annotations are not known.

    Args:
        sample: With ``img_path``, ``pred_instances`` and, if known, ``gt_instances``, whose masks
            tell whether they are in the coordinates of the original image.
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
        panels.insert(0, _drawn(image, _on_original(sample), names, limit))
        titles.insert(0, 'ground truth')
    return side_by_side(*panels, titles=titles)


def batch_picture(
    inputs: torch.Tensor,
    samples: Sequence[DetDataSample],
    names: Sequence[str],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rgb: bool,
) -> np.ndarray:
    """The first images of a batch in a grid, with the objects that the model learns from.

    Args:
        inputs: (N, 3, H, W) as the model gets them: normalised and padded.
        samples: With ``gt_instances`` in the same coordinates.
        names: Classes in label order.
        mean: Of the normalisation, by channel; None if there is none.
        std: Likewise.
        rgb: Whether the channels are in this order; else they are BGR.

    Returns:
        (H, W, 3) RGB uint8.
    """
    cells = []
    for tensor, sample in zip(inputs[:_BATCH], samples, strict=False):
        image = tensor.detach().float().cpu().numpy().transpose(1, 2, 0)
        if mean is not None and std is not None:
            image = image * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
        image = image.round().clip(0, 255).astype(np.uint8)
        cells.append(_drawn(image if rgb else image[..., ::-1], sample.gt_instances, names, _CELL))
    return contact_sheet(cells, width=_CELL)


def _on_original(sample: DetDataSample) -> InstanceData:
    """The ground truth in coordinates of the original image.

    It has them already where the pipeline loads annotations after ``Resize``, as test pipelines
    do; masks tell whether it does.
    """
    truth = sample.gt_instances
    height, width = sample.ori_shape[:2]
    masks = truth.get('masks')
    if masks is None or (masks.height, masks.width) == (height, width):
        return truth
    truth = truth.clone()
    boxes = truth.bboxes.tensor if hasattr(truth.bboxes, 'tensor') else truth.bboxes
    truth.bboxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
    truth.masks = masks.resize((height, width))
    return truth


def _drawn(image: np.ndarray, instances: InstanceData, names: Sequence[str], limit: int | None) -> np.ndarray:
    """An image with instances, made smaller first so that lines and text stay readable."""
    parts = {}
    for key, name in (('bboxes', 'boxes'), ('labels', 'labels'), ('scores', 'scores'), ('masks', 'masks')):
        if key in instances:
            parts[name] = _array(instances[key])
    height, width = image.shape[:2]
    factor = min(1.0, (limit or max(height, width)) / max(height, width))
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
        parts['boxes'] = parts['boxes'] * factor
        if 'masks' in parts:
            parts['masks'] = np.array(
                [
                    cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
                    for mask in parts['masks']
                ]
            ).reshape(-1, *size[::-1])
    return draw_instances(image, **parts, names=names)


def _array(value: Any) -> np.ndarray:
    """Numbers of tensors, mmdet's boxes and mmdet's masks."""
    if hasattr(value, 'to_ndarray'):
        return value.to_ndarray().astype(bool)
    return getattr(value, 'tensor', value).detach().cpu().numpy()


def spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` of the numbers below ``count``, as far apart as they can be."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


class _Pictures(Hook):
    """What both hooks do: choose samples by their place, and name the pictures.

    Args:
        num_images: How many; 0 draws none.
        score_thr: Predictions below this score are not drawn.
    """

    def __init__(self, num_images: int, score_thr: float = 0.3) -> None:
        self.num_images = num_images
        self.score_thr = score_thr
        self._begin(())

    def _begin(self, places: Sequence[int]) -> None:
        self._places, self._seen, self._names = set(places), 0, set()

    def _chosen(self, outputs: Sequence[DetDataSample] | None) -> list[tuple[str, DetDataSample]]:
        """The samples of a batch to draw, each with a name of its own."""
        chosen = []
        for sample in outputs or ():
            if self._seen in self._places:
                name = stem = Path(sample.img_path).stem
                if name in self._names:
                    name = f'{stem}_{sample.img_id}'
                self._names.add(name)
                chosen.append((name, sample))
            self._seen += 1
        return chosen

    def _picture(self, runner, sample: DetDataSample, limit: int | None = None) -> np.ndarray:
        return truth_and_prediction(sample, _class_names(runner), self.score_thr, limit)


def _class_names(runner) -> Sequence[str]:
    return (runner.visualizer.dataset_meta or {}).get('classes') or ()


@HOOKS.register_module()
class BoardPicturesHook(_Pictures):
    """Shows images in TensorBoard; does nothing without a ``BoardBackend``.

    After each validation the same images, ground truth beside prediction, as
    ``images/val/<name>``: spread over the data set, or over the share of the first of several
    processes. And when training starts or goes on, the first batch as the model gets it,
    augmented, as ``images/train_batch``.

    Args:
        num_images: How many validation images; 0 draws none.
        score_thr: Predictions below this score are not drawn.
    """

    def __init__(self, num_images: int = 4, score_thr: float = 0.3) -> None:
        super().__init__(num_images, score_thr)
        self._wanted = False
        self._handle = None

    def before_train(self, runner) -> None:
        self._wanted = board_of(runner) is not None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self._wanted:
            return
        self._wanted = False
        model = bare_model(runner)
        # To preprocess the batch once more could draw random numbers, and changes the samples.
        self._handle = model.data_preprocessor.register_forward_hook(partial(self._show_batch, runner))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _show_batch(self, runner, preprocessor, args, batch) -> None:
        cfg = runner.cfg.model.get('data_preprocessor') or {}
        board_of(runner).add_image(
            board.TRAIN_BATCH,
            batch_picture(
                batch['inputs'],
                batch['data_samples'],
                _class_names(runner),
                cfg.get('mean'),
                cfg.get('std'),
                bool(cfg.get('bgr_to_rgb')),
            ),
            runner.iter,
        )

    def before_val_epoch(self, runner) -> None:
        self._begin(spread(len(runner.val_dataloader.sampler), self.num_images) if board_of(runner) else ())

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for name, sample in self._chosen(outputs):
            board_of(runner).add_image(
                f'{board.VAL_IMAGES}/{name}', self._picture(runner, sample, _PAIR), validation_step(runner)
            )


@HOOKS.register_module()
class TestPicturesHook(_Pictures):
    """Draws the first test images, ground truth beside prediction, to ``<work_dir>/figures``.

    Args:
        num_images: How many; 0 draws none.
        score_thr: Predictions below this score are not drawn.
    """

    def __init__(self, num_images: int = 8, score_thr: float = 0.3) -> None:
        super().__init__(num_images, score_thr)

    def before_test(self, runner) -> None:
        self._begin(range(self.num_images) if is_main_process() else ())

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for name, sample in self._chosen(outputs):
            _, png = cv2.imencode('.png', self._picture(runner, sample)[..., ::-1])
            atomic_write_bytes(Path(runner.work_dir) / 'figures' / f'{name}.png', png.tobytes())
