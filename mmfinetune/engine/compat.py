"""Private parts and messages of MMEngine, MMDetection and PyTorch that the toolkit relies on.

The only file that may touch them. ``tests/engine/test_compat.py`` fails where a new version changes one.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from multiprocessing import queues
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdet.datasets.api_wrappers import COCO
    from mmdet.evaluation.metrics import CocoMetric
    from mmengine.optim import AmpOptimWrapper

# Where a process that torchrun started leaves its error.
ERROR_FILE = 'TORCHELASTIC_ERROR_FILE'
_LOST_CONNECTION = (  # gloo and NCCL, when a peer has gone
    'Connection closed by peer',
    'Connection reset by peer',
    'Broken pipe',
    'ncclRemoteError',
    'NCCL communicator was aborted',
)
_PORT_TAKEN = ('EADDRINUSE', 'address already in use')


def truth_of(metric: CocoMetric) -> COCO | None:
    """The ground truth that a metric has read; None without ``ann_file``."""
    return metric._coco_api


def lower_loss_scale(wrapper: AmpOptimWrapper) -> None:
    """What the gradient scaler does at an overflow, without a call of the optimizer.

    PyTorch's fused SGD keeps memory that nothing has written, or infinity, as its momentum if its first step overflows.
    """
    wrapper.loss_scaler.unscale_(wrapper.optimizer)
    wrapper.loss_scaler.update(getattr(wrapper, '_scale_update_param', None))


def when_not_sent(act: Callable[[Any, Exception, Any], None]) -> None:
    """Let this process call a function with queue, error and object where a queue would drop an object.

    As a process that loads data does with a batch for which there is no shared memory; the other end waits for it for ever.
    """
    queues.Queue._on_queue_feeder_error = act  # type: ignore[attr-defined]


# PyTorch has no exception types for these.


def is_worker_killed(error: BaseException) -> bool:
    """Whether a process that loads data was killed."""
    return isinstance(error, RuntimeError) and 'DataLoader worker' in str(error)


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Whether PyTorch, or NCCL, could not allocate shared memory."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        mark in text for mark in ('shared memory(shm)', 'shared memory segment')
    )


def is_empty_dataset(error: BaseException) -> bool:
    """Whether MMEngine found nothing to serialize in a data set: a filter left no image."""
    return isinstance(error, ValueError) and 'need at least one array' in str(error)


def is_out_of_cpu_memory(error: BaseException) -> bool:
    """Whether PyTorch could not allocate memory on the CPU."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_connection_lost(text: str) -> bool:
    """Whether an error's text says that another process of the run has gone."""
    return any(mark in text for mark in _LOST_CONNECTION)


def is_port_taken(error: BaseException) -> bool:
    """Whether processes cannot meet because another program uses the port."""
    return any(mark in str(error) for mark in _PORT_TAKEN)


def write_error_file(path: str | Path, text: str, error: BaseException) -> None:
    """Leave an error to the process that started this one.

    The format is that of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``, plus seconds:
    its own timestamp is too coarse to distinguish cause and consequence.
    """
    now = time.time()
    facts = {'py_callstack': ''.join(traceback.format_exception(error)), 'seconds': now, 'timestamp': str(int(now))}
    Path(path).write_text(json.dumps({'message': {'message': text, 'extraInfo': facts}}))


def read_error_file(path: str | Path) -> tuple[float, str] | None:
    """When a process failed and its error; None if it left none, or not by `write_error_file`."""
    try:
        message = json.loads(Path(path).read_text())['message']
        return message['extraInfo']['seconds'], message['message']
    except (OSError, ValueError, KeyError, TypeError):
        return None
