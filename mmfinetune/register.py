"""Import this (``custom_imports``) and the toolkit's parts are in mmdet's registries."""

from mmfinetune import ops

# Before anything imports mmcv.ops.
ops.install()

from mmfinetune import hooks, metrics, optim, transforms  # noqa: E402, F401
