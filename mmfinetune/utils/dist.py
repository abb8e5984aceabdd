"""One process among several: who speaks, and who goes first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.runner import Runner
    from torch import nn


def bare_model(runner: Runner) -> nn.Module:
    """The model of a runner, without the wrapper that several processes put around it."""
    from mmengine.model import is_model_wrapper

    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def say(text: str, aside: bool = False) -> None:
    """Print once, whatever the number of processes; ``aside`` to stderr, where it is no part of a tool's output."""
    from mmengine.dist import is_main_process

    if is_main_process():
        print(text, file=sys.stderr if aside else sys.stdout, flush=True)


def rank0_first(work: Callable[[], Any]) -> Any:
    """Run on rank 0 and give all ranks the result; a UserError there is raised on all."""
    from mmengine.dist import broadcast_object_list, get_rank

    outcome: list = [None]
    if get_rank() == 0:
        try:
            outcome = [work()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)  # does nothing in a single process
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
