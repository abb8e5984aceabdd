"""Import this (``custom_imports``) and the toolkit's parts are in mmdet's registries."""

from mmfinetune import ops

# Before anything imports mmcv.ops.
ops.install()

from mmfinetune import (  # noqa: E402, F401
    backends,
    guards,
    hooks,
    loops,
    metrics,
    optim,
    picture_hooks,
    result_hooks,
    saving,
    train_loop,
    transforms,
)
