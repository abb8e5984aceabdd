"""Where curves and pictures go: TensorBoard, laid out for reading, and MLflow."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import VISBACKENDS
from mmengine.visualization import MLflowVisBackend, TensorboardVisBackend
from tensorboard.compat.proto.summary_pb2 import Summary

from mmfinetune.evaluation import tensorboard

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@VISBACKENDS.register_module()
class TensorBoardBackend(TensorboardVisBackend):
    """TensorBoard with the sub-runs ``train`` and ``val``, which share tags and the training step as x axis.

    Tags are those of `mmfinetune.evaluation.tensorboard.tag_of`; the names that other backends write stay MMEngine's.
    No file is opened before there is something to plot, so that a test leaves no trace among the curves of the
    training.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        self._folder = Path(save_dir)
        self._writers: dict[str, SummaryWriter] = {}
        self._config: str | None = None
        self._purge: dict[str, int | None] = {}
        self._by_step: set[str] = set()

    @property
    def experiment(self) -> SummaryWriter:
        """The writer of ``train``."""
        return self._writer(tensorboard.TRAIN)

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # The first part of a run tells its start too: TensorBoard takes the first that it reads for no restart.
            purge_step = self._purge.get(run, _step())
            self._purge[run] = None
            self._writers[run] = SummaryWriter(str(self._folder / run), purge_step=purge_step)
            if run == tensorboard.TRAIN and self._config is not None:
                text, self._config = tensorboard.fenced(self._config, 'python'), None
                self._writers[run].add_text(tensorboard.CONFIG, text, purge_step or 1)
        return self._writers[run]

    def add_config(self, config: Config, **kwargs) -> None:
        """Keep the config for when the file is opened."""
        self._config = config.pretty_text

    def resume(self, step: int, validates: bool) -> None:
        """Continue the curves of an earlier part of the run after this step.

        Args:
            step: Steps that are done.
            validates: Whether the validation at this step is still to be made.
        """
        self.close()
        self._purge = {tensorboard.TRAIN: step + 1, tensorboard.VAL: step + (not validates)}
        # Of a work dir that has another name since then.
        others = [folder.parent for folder in self._folder.parent.glob(f'*/{tensorboard.TRAIN}')]
        if len(others) == 1 and not self._folder.exists():
            others[0].rename(self._folder)

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs) -> None:
        """Plot one value, under its tag."""
        self._plot(_run_of(name), {tensorboard.tag_of(name): value}, step)

    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs) -> None:
        """Plot a record of MMEngine's logger, a validation at the training step of it."""
        tags = tensorboard.tags_of(scalar_dict)
        if 'iter' in scalar_dict:
            values = {tag: scalar_dict[name] for name, tag in tags.items() if name not in self._by_step}
            self._plot(tensorboard.TRAIN, values, step)
            return
        hub = MessageHub.get_current_instance()
        values = {tag: scalar_dict[name] for name, tag in tags.items()}
        for name in tensorboard.HIGHER.keys() & tags:
            # Each checkpoint has this history.
            history = hub.get_scalar(f'val/{name}').data[0]
            history = history[np.isfinite(history)]
            if history.size:
                values[tensorboard.best_tag(name)] = history.max() if tensorboard.HIGHER[name] else history.min()
        self._plot(tensorboard.VAL, values, _step())

    def add_losses(self, names: Iterable[str], step: int) -> None:
        """Plot what a training step returned, in place of what the logger's records have of it; see `tensorboard.gap`.

        Args:
            names: Names of the losses, whose values are in the message hub.
            step: Number of the step, from 1.
        """
        self._by_step.update(names)
        gap = tensorboard.gap(step)
        if step % gap:
            return
        hub, means = MessageHub.get_current_instance(), {}
        for name in names:
            values, counts = (part[-gap:] for part in hub.get_scalar(f'train/{name}').data)
            if counts.any():  # not of steps that were skipped
                means[tensorboard.tag_of(name)] = values[counts > 0].mean()
        self._plot(tensorboard.TRAIN, means, step)

    def _plot(self, run: str, values: Mapping[str, Any], step: int) -> None:
        for tag, value in values.items():
            if isinstance(value, (int, float, torch.Tensor, np.ndarray, np.number)):
                self._writer(run).add_scalar(tag, value, step)
            else:
                warnings.warn(f'{tag} is not a number but {type(value)}: skipped', stacklevel=2)
        # A checkpoint is saved after this; a kill must not leave it with a gap before it.
        if run in self._writers:
            self._writers[run].flush()

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs) -> None:
        """Show a picture under a tag; ``image`` is (H, W, 3) RGB uint8."""
        # PNG, which SummaryWriter would make of it, is several times as large for photographs.
        height, width = image.shape[:2]
        _, jpeg = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=jpeg.tobytes())
        self.add_summaries(_run_of(name), Summary(value=[Summary.Value(tag=name, image=picture)]), step=step)

    def add_text(self, tag: str, text: str, step: int = 0, language: str = '') -> None:
        """Show a text unchanged."""
        self.experiment.add_text(tag, tensorboard.fenced(text, language), step)

    def add_summaries(self, run: str, *summaries: Summary, step: int = 0) -> None:
        """Write TensorBoard's own messages."""
        writer: Any = self._writer(run)
        for summary in summaries:
            writer.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """Close the files; what comes after that opens others."""
        while self._writers:
            self._writers.popitem()[1].close()


def _step() -> int:
    """The number of the training step of now, as `RuntimeInfoHook` keeps it."""
    return MessageHub.get_current_instance().get_info('iter', -1) + 1


def _run_of(name: str) -> str:
    """The sub-run of a scalar or picture by its name."""
    is_val = name.startswith(('val/', 'coco/', tensorboard.VAL_IMAGES))
    return tensorboard.VAL if is_val else tensorboard.TRAIN


@VISBACKENDS.register_module()
class MLflowBackend(MLflowVisBackend):
    """``MLflowVisBackend`` whose validation metrics arrive.

    MLflow refuses a whole record for one name that it does not allow, such as ``coco/segm_AR@1``, and opens another run
    where a test after the training closes the finished one.
    """

    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs) -> None:
        """Log a record, ``_`` for each character that MLflow does not allow in names."""
        allowed = {re.sub(r'[^/\w.\- :]', '_', name): value for name, value in scalar_dict.items()}
        super().add_scalars(allowed, step, file_path, **kwargs)

    def close(self) -> None:
        """End the run, unless it has ended."""
        if hasattr(self, '_mlflow') and self._mlflow.active_run():
            super().close()
