"""Where curves and pictures go: TensorBoard, laid out for reading, and MLflow."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.visualization import MLflowVisBackend, TensorboardVisBackend
from mmengine.visualization.vis_backend import force_init_env
from tensorboard.compat.proto.summary_pb2 import Summary

from mmfinetune.engine.compat import write_summary
from mmfinetune.evaluation import tensorboard


@VISBACKENDS.register_module()
class TensorBoardBackend(TensorboardVisBackend):
    """TensorBoard with named groups of curves, charts that overlay them, and the best so far.

    Tags are those of `mmfinetune.evaluation.tensorboard.tag_of`; the names that other backends write stay MMEngine's.
    No file is opened before there is something to plot, so that a test leaves no trace among the curves of the
    training.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        self._config: str | None = None
        self._start = 0
        self._earlier: dict[str, tuple[int, float]] = {}
        self._best: dict[str, float] = {}

    def _init_env(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A TensorBoard that is running now has read the points after the checkpoint already.
        self._tensorboard = SummaryWriter(self._save_dir, purge_step=self._start + 1 if self._start else None)
        layout = {
            category: {title: ['Multiline', tags] for title, tags in charts.items()}
            for category, charts in tensorboard.LAYOUT.items()
        }
        self._tensorboard.add_custom_scalars(layout)
        if self._config is not None:
            self._tensorboard.add_text(tensorboard.CONFIG, tensorboard.fenced(self._config, 'python'), self._start)

    def add_config(self, config: Config, **kwargs) -> None:
        """Keep the config for when the file is opened."""
        self._config = config.pretty_text

    def resume(self, step: int, epoch: int) -> None:
        """Continue the curves of an earlier part of the run after this step and epoch; see `tensorboard.rewind`."""
        self.close()
        self._env_initialized = False
        self._start = step
        self._earlier = tensorboard.rewind(Path(self._save_dir), step, epoch)
        names = {tag: tensorboard.best_tag(tag) for tag in tensorboard.HIGHER}
        self._best = {tag: self._earlier[name][1] for tag, name in names.items() if name in self._earlier}

    def _is_there(self, tag: str, step: int) -> bool:
        """Whether an earlier part of the run has the point, e.g. where an epoch is validated again."""
        return step <= self._earlier.get(tag, (-1,))[0]

    def _plot(self, tag: str, value: Any, step: int) -> None:
        if not self._is_there(tag, step):
            super().add_scalar(tag, value, step)

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs) -> None:
        """Plot one value, under its tag."""
        self._plot(tensorboard.tag_of(name), value, step)

    @force_init_env
    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs) -> None:
        """Plot a record of MMEngine's logger. It is in the file when this returns."""
        for tag, value in tensorboard.tags_of(scalar_dict).items():
            self._plot(tag, value, step)
            if tag in tensorboard.HIGHER and math.isfinite(value):
                better = max if tensorboard.HIGHER[tag] else min
                self._best[tag] = better(value, self._best.get(tag, value))
                self._plot(tensorboard.best_tag(tag), self._best[tag], step)
        # A checkpoint is saved after this; a kill must not leave it with a gap before it.
        self._tensorboard.flush()

    @force_init_env
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs) -> None:
        """Show a picture under a tag; ``image`` is (H, W, 3) RGB uint8."""
        if self._is_there(name, step):
            return
        # PNG, which SummaryWriter would make of it, is several times as large for photographs.
        height, width = image.shape[:2]
        _, jpeg = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=jpeg.tobytes())
        self.add_summaries(Summary(value=[Summary.Value(tag=name, image=picture)]), step=step)

    @force_init_env
    def add_text(self, tag: str, text: str, step: int = 0, language: str = '') -> None:
        """Show a text unchanged."""
        self._tensorboard.add_text(tag, tensorboard.fenced(text, language), step)

    @force_init_env
    def add_summaries(self, *summaries: Summary, step: int = 0) -> None:
        """Write TensorBoard's own messages."""
        for summary in summaries:
            write_summary(self._tensorboard, summary, step)


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
