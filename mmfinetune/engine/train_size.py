"""How long an epoch is, from the training data as training builds them: wrappers, filters and samplers included."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmfinetune.engine import compat
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


@dataclass(frozen=True)
class TrainSize:
    """Size of an epoch.

    Attributes:
        samples: Length of the data set: images, as often as wrappers repeat them.
        steps: Steps of an epoch in each process.
    """

    samples: int
    steps: int


def measure(cfg: Config, world: int) -> TrainSize:
    """Build the training data of a config and count.

    Args:
        cfg: Resolved config.
        world: Number of processes that will train; fewer may run yet.

    Raises:
        UserError: They cannot be built, or give no step.
    """
    from mmengine.dist import get_world_size
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    init_default_scope(cfg.get('default_scope') or 'mmdet')
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it loads
            loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        batches = loader.batch_sampler
        steps = len(loader)
        if world != get_world_size():
            steps = math.ceil(len(batches.sampler) / world) / batches.batch_size
            steps = math.floor(steps) if batches.drop_last else math.ceil(steps)
        size = TrainSize(len(loader.dataset), steps)
    except UserError:
        raise
    except Exception as error:  # whatever classes raise of arguments that they do not take together
        if compat.is_empty_dataset(error):
            raise UserError('train-no-steps', samples=0, batch=cfg.train_dataloader.batch_size * world) from None
        raise UserError('train-data-unbuildable', kind=type(error).__name__, why=str(error)) from error
    if not size.steps:
        raise UserError('train-no-steps', samples=size.samples, batch=batches.batch_size * world)
    return size
