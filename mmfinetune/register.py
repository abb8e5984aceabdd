"""Import this (``custom_imports``) and the toolkit's parts are in mmdet's registries."""

from mmfinetune.models import ops
from mmfinetune.weights import data_only

# Before anything imports mmcv.ops.
ops.install()
data_only.install()

from mmfinetune.engine import loss_loops, metrics, optim, runner, train_loop, transforms, vis_backends  # noqa: E402, F401
from mmfinetune.engine.hooks import (  # noqa: E402, F401
    checkpoint,
    console,
    divergence,
    early_stop,
    nonfinite,
    pictures,
    results,
    stop,
    tensorboard,
)
