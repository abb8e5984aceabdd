"""Validation and test loops that compute the loss next to the metrics."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.registry import LOOPS
from mmengine.runner import Runner, TestLoop, ValLoop
from mmengine.runner.amp import autocast

from mmfinetune.engine.hooks import warn
from mmfinetune.engine.training_dataset import random_state_kept
from mmfinetune.engine.transforms import scaled_truth
from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.errors import Message


def resized_truth(sample: DetDataSample) -> DetDataSample | None:
    """The ground truth of a test pipeline as the training pipeline would give it.

    Args:
        sample: With ``gt_instances`` (boxes in px, masks) and the metainfo ``ori_shape``, ``img_shape``,
            ``scale_factor``, ``batch_input_shape``.

    Returns:
        A new sample without predictions; None if there is no ground truth.
    """
    if 'gt_instances' not in sample or 'bboxes' not in sample.gt_instances:
        return None
    truth = DetDataSample(metainfo=sample.metainfo)
    for name in ('gt_instances', 'ignored_instances'):
        if name in sample:
            objects = scaled_truth(sample, sample.img_shape[:2], name)
            if 'masks' in objects:
                objects.masks = objects.masks.pad(sample.batch_input_shape)
            truth.set_field(objects, name)
    return truth


@contextlib.contextmanager
def _features(model: BaseDetector, features: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Let the model take these feature maps for those of its input."""
    model.extract_feat = lambda _: features  # on the instance, over the class's method
    try:
        yield
    finally:
        del model.extract_feat


class _MeanLoss(BaseMetric):
    """Mean over the images of all processes; the loop adds the losses of each image to ``results``."""

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Add nothing."""

    def compute_metrics(self, results: list[dict[str, float]]) -> dict[str, float]:
        """The means, summed in the order of the data set, so that the last digits agree too."""
        return {key: float(np.mean([row[key] for row in results])) for key in results[0]}


class _LossLoop:
    """What both loops do: predict, and take the loss from the same features.

    The loss is that of training (the model's ``loss``, with its assigners and samplers), in eval mode and without
    gradient, of each image by itself. Samplers are seeded by the image id, so that neither batch size nor the number of
    processes nor the order changes what is drawn, and the random state of training stays as it is. ``<stage>/loss`` and
    ``<stage>/<term>`` are among the metrics.

    Args:
        loss: Whether to compute it.
        *args, **kwargs: See the base class.
    """

    stage: str
    # Of MMEngine's loop:
    runner: Runner
    evaluator: Evaluator
    fp16: bool

    def __init__(self, *args, loss: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        # Collected by messages, on whatever device; 'cpu' would leave a folder where the user works.
        self._mean_loss = _MeanLoss(collect_device='gpu', prefix=self.stage)
        if loss:
            self.evaluator.metrics.append(self._mean_loss)

    def run(self) -> dict[str, float]:
        """Predict, evaluate and take the losses of all batches."""
        # Or the log of a batch would show the losses, and the mean of the times, of the pass before.
        scalars = self.runner.message_hub.log_scalars
        for name in [name for name in scalars if name.startswith(f'{self.stage}/')]:
            del scalars[name]
        return super().run()  # type: ignore[misc]

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """Predict a batch, evaluate it and take its losses."""
        call, stage = self.runner.call_hook, self.stage
        call(f'before_{stage}_iter', batch_idx=idx, data_batch=data_batch)
        with autocast(enabled=self.fp16):
            outputs = self._predict(data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        call(f'after_{stage}_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)

    def _predict(self, data_batch: Sequence[dict]) -> list[DetDataSample]:
        model: Any = bare_model(self.runner)
        data = model.data_preprocessor(data_batch, False)
        inputs, samples = data['inputs'], data['data_samples']
        truths = [truth for sample in samples if (truth := resized_truth(sample))] if self.loss else []
        if self.loss and len(truths) < len(samples):
            warn(Message('no-loss', stage=self.stage))
            self.loss = False
            self.evaluator.metrics.remove(self._mean_loss)
        if not self.loss:
            return model(inputs, samples, mode='predict')
        features = model.extract_feat(inputs)
        with _features(model, features):
            outputs = model(inputs, samples, mode='predict')
        for i, truth in enumerate(truths):
            with _features(model, tuple(level[i : i + 1] for level in features)), random_state_kept(inputs.device):
                # What RoI samplers draw from.
                seed = zlib.crc32(str(truth.img_id).encode())
                torch.manual_seed(seed)
                np.random.seed(seed)
                losses = model(inputs[i : i + 1], [truth], mode='loss')
            self._mean_loss.results.append({k: float(v) for k, v in model.parse_losses(losses)[1].items()})
        return outputs


@LOOPS.register_module()
class ValLossLoop(_LossLoop, ValLoop):
    """Validation with losses: ``val/loss`` and ``val/<term>`` among the metrics."""

    stage = 'val'


@LOOPS.register_module()
class TestLossLoop(_LossLoop, TestLoop):
    """Test with losses: ``test/loss`` and ``test/<term>`` among the metrics."""

    stage = 'test'
