"""What several processes of one run do together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmfinetune import config
from mmfinetune.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    from mmengine.dist import is_main_process
    if is_main_process():
        print(text, flush=True)


def join_group(cfg: Config) -> int:
    """Join torchrun's processes, if it started this one; the number of processes.

    The group is made here and not by the Runner, which calls CUDA even for gloo.
    """
    world = int(os.environ.get('WORLD_SIZE', 1))
    if 'LOCAL_RANK' not in os.environ or world == 1:
        return 1
    import torch
    from mmengine.dist import init_dist, is_distributed
    cfg.launcher = 'pytorch'
    if torch.cuda.is_available():
        if not is_distributed():
            init_dist('pytorch', backend='nccl')
    else:
        cfg.env_cfg.dist_cfg = dict(backend='gloo')
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None,
                                     broadcast_buffers=False)
        if not is_distributed():
            torch.distributed.init_process_group('gloo')
    for split in ('val', 'test'):
        for evaluator in config.evaluators(cfg, split):
            # By messages; the other way leaves a folder .dist_test where the user works.
            evaluator.setdefault('collect_device', 'gpu')
    return world


def rank0_first(work: Callable[[], Any]) -> Any:
    """Run on rank 0 and give all ranks the result; a UserError there is raised on all."""
    from mmengine.dist import broadcast_object_list, get_rank, get_world_size
    if get_world_size() == 1:
        return work()
    outcome: list = [None]
    if get_rank() == 0:
        try:
            outcome = [work()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
