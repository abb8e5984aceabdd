"""What several processes of one run do together."""

from __future__ import annotations

import datetime
import os
import warnings
from typing import TYPE_CHECKING, Any

from mmfinetune.config import views
from mmfinetune.engine import launch
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


# Others wait while rank 0 prepares data, fetches weights or computes AP: longer than the 10 minutes
# after which NCCL takes a process for dead. `env_cfg.dist_cfg.timeout` sets another.
SECONDS_TO_WAIT = 3600


def join_group(cfg: Config) -> int:
    """Join the other processes, if torchrun or Slurm started this one; their number.

    The group is made here and not by the Runner, which calls CUDA even for gloo.
    """
    launch.adopt_slurm()
    world = int(os.environ.get('WORLD_SIZE', 1))
    if 'LOCAL_RANK' not in os.environ or world == 1:
        return 1
    import torch

    # Of a name that MMEngine passes, too; the new one is not in all supported versions.
    warnings.filterwarnings('ignore', '.broadcast_buffers. is deprecated', FutureWarning)
    cfg.launcher = 'pytorch'
    settings = {'timeout': SECONDS_TO_WAIT, **(cfg.env_cfg.get('dist_cfg') or {})}
    if not torch.cuda.is_available():
        settings['backend'] = 'gloo'
        cfg.env_cfg.dist_cfg = dict(settings)
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    _begin_group(settings)
    for split in ('val', 'test'):
        for evaluator in views.evaluators(cfg, split):
            # By messages; the other way leaves a folder .dist_test where the user works.
            evaluator.setdefault('collect_device', 'gpu')
    return world


def _begin_group(settings: dict[str, Any]) -> None:
    import torch
    from mmengine.dist import init_dist, is_distributed

    if is_distributed():
        return
    local, visible = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if 0 < visible <= local:
        raise UserError(
            f'Process {local} of this machine has no GPU: PyTorch sees {visible}, and they are counted from 0',
            cure='start as many processes as GPUs',
        )
    try:
        if torch.cuda.is_available():
            init_dist('pytorch', **settings)
        else:
            torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=settings['timeout']))
    except torch.distributed.DistNetworkError as error:
        raise launch.no_meeting(
            error, os.environ.get('MASTER_ADDR', '?'), os.environ.get('MASTER_PORT', '?')
        ) from error
