"""Several processes of one run: start them, or join those that torchrun or Slurm started.

PyTorch's elastic launcher (what ``torchrun`` is) does the work.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.utils.errors import UserError

# Process id of the launcher, which shows the errors of those that it started.
LAUNCHED = 'MMFINETUNE_LAUNCHED'
# This machine's place in a run on several: rank/count@host:port; see tools/dist_train.sh.
NODE = 'MMFINETUNE_NODE'
ERROR_FILE = 'TORCHELASTIC_ERROR_FILE'
# A step and a checkpoint on a slow disk must fit in between the signal and the kill.
SECONDS_TO_STOP = 120
# Machines of one job may start that far apart.
SECONDS_TO_MEET = 900
# What a process says whose peer has gone, in gloo and NCCL.
_LOST = (
    'Connection closed by peer',
    'Connection reset by peer',
    'Broken pipe',
    'ncclRemoteError',
    'NCCL communicator was aborted',
)
_PORT_TAKEN = ('EADDRINUSE', 'address already in use')
# The agent gives the others 30 s after the first failure, then kills them.
_GRACE = 25


@dataclass(frozen=True)
class Node:
    """This machine among those of a run."""

    rank: int = 0
    count: int = 1
    host: str = '127.0.0.1'
    port: int = 0

    @staticmethod
    def of_environment() -> Node:
        """What tools/dist_train.sh says; the only machine otherwise.

        Raises:
            UserError: It says something else than rank/count@host:port.
        """
        text = os.environ.get(NODE)
        if not text:
            return Node()
        found = re.fullmatch(r'(\d+)/(\d+)@(\S+):(\d+)', text)
        if not found or not int(found[1]) < int(found[2]) or not 0 < int(found[4]) < 2**16:
            raise UserError(
                f'{NODE}={text}: expected rank/count@host:port, the rank from 0 to count - 1, the port below 65536',
                cure='start with tools/dist_train.sh, which sets it',
            )
        return Node(int(found[1]), int(found[2]), found[3], int(found[4]))


def is_worker() -> bool:
    """Whether torchrun, Slurm's srun or :func:`launch` started this process as one of several."""
    return 'LOCAL_RANK' in os.environ or _slurm_tasks() > 1


def was_launched() -> bool:
    """Whether :func:`launch` started this process."""
    return LAUNCHED in os.environ


def _slurm_tasks() -> int:
    # Of the step and not of the job: a batch script sees the job's tasks, but is alone. And a task
    # that starts processes of its own is none of them.
    if 'SLURM_LOCALID' not in os.environ or NODE in os.environ:
        return 1
    return int(os.environ.get('SLURM_STEP_NUM_TASKS', 1))


def adopt_slurm() -> None:
    """Give a task that ``srun`` started the environment that torchrun would give it.

    Raises:
        UserError: The first node cannot be told.
    """
    env = os.environ
    if 'LOCAL_RANK' in env or _slurm_tasks() <= 1:
        return
    nodes = env.get('SLURM_STEP_NODELIST') or env.get('SLURM_JOB_NODELIST', '')
    if 'MASTER_ADDR' not in env:
        try:
            shown = subprocess.run(
                ['scontrol', 'show', 'hostnames', nodes], check=True, capture_output=True, text=True
            ).stdout.split()
            env['MASTER_ADDR'] = shown[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise UserError(
                f'The first node of {nodes!r} cannot be told: {error}',
                cure='export MASTER_ADDR with its host name before srun',
            ) from None
    # The same for all tasks, and another one for each job on a shared node.
    env.setdefault('MASTER_PORT', str(20000 + int(env.get('SLURM_JOB_ID', 0)) % 10000))
    # With --gpus-per-task each task sees its own GPU alone.
    alone = re.fullmatch(r'[^,]+', env.get('CUDA_VISIBLE_DEVICES', ''))
    env.update(
        RANK=env['SLURM_PROCID'], LOCAL_RANK='0' if alone else env['SLURM_LOCALID'], WORLD_SIZE=str(_slurm_tasks())
    )


def processes(gpus: str | None) -> int:
    """How many processes to start, on all machines together.

    Args:
        gpus: Of this machine: ``'all'``, a number, or None for all visible GPUs. Without a GPU a
            number means processes on the CPU.

    Raises:
        UserError: Not a positive number, or more than there are GPUs.
    """
    machines = Node.of_environment().count
    if gpus is not None and gpus != 'all' and not (gpus.isdigit() and int(gpus) > 0):
        raise UserError(f'--gpus {gpus}: pass a number of at least 1, or all')
    if gpus == '1':
        return machines
    import torch

    # Counted without a CUDA context in the process that only starts others.
    visible = torch.cuda.device_count()
    if gpus in (None, 'all'):
        return machines * max(1, visible)
    if visible and int(gpus) > visible:
        raise UserError(
            f'--gpus {gpus}: PyTorch sees {visible} GPU{"s" if visible > 1 else ""}',
            cure='ask for fewer, or check CUDA_VISIBLE_DEVICES',
        )
    return machines * int(gpus)


def launch(count: int, argv: Sequence[str]) -> int:
    """Run ``python <argv>`` in several processes of one run.

    The first real error of any of them stops all and is shown once.

    Args:
        count: Of processes, on all machines together; this one starts its share.
        argv: Script and arguments.

    Returns:
        Exit code: 0, 2 after a UserError, 128 + the signal after a stop, else that of a crash, 70.

    Raises:
        UserError: The machines do not meet.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    node = Node.of_environment()
    local = count // node.count
    if node.count > 1:
        print(
            f'Machine {node.rank} of 0 to {node.count - 1}: {local} of {count} processes; they '
            f'meet at {node.host}:{node.port}',
            flush=True,
        )
        meet = dict(
            rdzv_backend='static',
            rdzv_endpoint=f'{node.host}:{node.port}',
            rdzv_configs={'rank': node.rank, 'timeout': SECONDS_TO_MEET},
            run_id='mmfinetune',
        )
    else:
        # Port 0: whichever is free, so that two runs on one machine do not meet.
        meet = dict(
            rdzv_backend='c10d', rdzv_endpoint='127.0.0.1:0', local_addr='127.0.0.1', run_id=f'mmfinetune_{os.getpid()}'
        )
    with tempfile.TemporaryDirectory(prefix='mmfinetune_') as folder, _for_workers(local), _silence():
        config = LaunchConfig(
            min_nodes=node.count,
            max_nodes=node.count,
            nproc_per_node=local,
            max_restarts=0,
            shutdown_timeout=SECONDS_TO_STOP,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **meet,
        )
        try:
            elastic_launch(config, sys.executable)(*argv)
        except ChildFailedError as error:
            return _show(error.failures, alone=node.count == 1)
        except SignalException as error:
            # What went wrong while they stopped, a full disk for example.
            told = [_read(path) for path in Path(folder).rglob('error.json')]
            if any(told):
                print(min(filter(None, told))[1], file=sys.stderr, flush=True)
            return 128 + int(error.sigval)
        except (DistNetworkError, RendezvousError) as error:
            raise no_meeting(error, node.host, node.port) from error
    return 0


@contextlib.contextmanager
def _for_workers(count: int) -> Iterator[None]:
    """What the processes find in their environment."""
    before = dict(os.environ)
    os.environ[LAUNCHED] = str(os.getpid())
    # Each process would else start as many threads as there are cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ.setdefault(name, str(max(1, (cores or 1) // count)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide the launcher's own account of a failure: exit codes, signals sent."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def no_meeting(error: Exception, host: str, port: int | str) -> UserError:
    """What to tell when the processes of a run did not find each other."""
    where = f'{host}:{port}'
    if any(mark in str(error) for mark in _PORT_TAKEN):
        return UserError(
            f'The port of {where} is taken by another program',
            cure='pass another one, the same on all machines: PORT=29501 with '
            'tools/dist_train.sh, --master-port with torchrun, MASTER_PORT with srun',
        )
    return UserError(
        f'The processes of the run do not meet at {where}: {str(error).strip().splitlines()[0]}',
        cure='check that this is the address of machine 0, that its port can be '
        'reached from here, and that all machines were started',
    )


def _read(path: str | Path) -> tuple[float, str] | None:
    """When a process failed and what it says; None if it left no word, or not by `report`."""
    try:
        message = json.loads(Path(path).read_text())['message']
        return message['extraInfo']['seconds'], message['message']
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _show(failures: dict, alone: bool = True) -> int:
    """Print the failure that came first and was no consequence of another; its exit code.

    Args:
        failures: By rank; elastic's ``ProcessFailure``.
        alone: Whether all processes of the run are of this machine.
    """
    started = min(failure.timestamp for failure in failures.values())

    def order(item: tuple) -> tuple:
        rank, failure = item
        told = _read(failure.error_file)
        # Killed from outside, it had no chance to write anything down, while its peers complain of
        # the lost connection; NCCL ends these by SIGABRT, the agent by SIGTERM and then SIGKILL.
        killed = (
            failure.exitcode < 0
            and failure.timestamp < started + _GRACE
            and -failure.exitcode not in (signal.SIGTERM, signal.SIGABRT)
        )
        kind = 0 if told and failure.exitcode == 2 else 1 if killed else 3 if failure.exitcode == -signal.SIGTERM else 2
        return kind, told[0] if told else failure.timestamp, rank

    rank, failure = min(failures.items(), key=order)
    told = _read(failure.error_file)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ' (the kernel does so when memory runs out)' if name == 'SIGKILL' else ''
        text = (
            f'error: process {rank} of the run was killed by {name}{hint}; the others were '
            'stopped.\nHow to mend it: go on with --resume'
        )
    elif failure.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        return failure.exitcode  # it has said itself where it stopped
    elif not told:
        text = f'error: process {rank} of the run ended with exit code {failure.exitcode}; what it says is above'
    elif not alone and any(mark in told[1] for mark in _LOST):
        text = (
            'error: a process of another machine has gone '
            f'({told[1].strip().splitlines()[-1]}).\nHow to mend it: its output says why; then '
            'go on with --resume'
        )
    else:
        text = told[1]
    print(text, file=sys.stderr, flush=True)
    # 1 is a tool's answer, and a signal no exit code: both are crashes here.
    return failure.exitcode if failure.exitcode > 1 else os.EX_SOFTWARE


def report(text: str, error: BaseException) -> bool:
    """Leave an error to the launcher.

    Args:
        text: What to show.
        error: For the traceback that torchrun's own summary has.

    Returns:
        Whether the launcher shows it, so that this process need not.
    """
    file = os.environ.get(ERROR_FILE)
    if file:
        # The format of torch.distributed.elastic.multiprocessing.errors.ErrorHandler; its own
        # timestamp is too coarse to tell cause and consequence.
        stack = ''.join(traceback.format_exception(error))
        Path(file).write_text(
            json.dumps(
                {
                    'message': {
                        'message': text,
                        'extraInfo': {
                            'py_callstack': stack,
                            'seconds': time.time(),
                            'timestamp': str(int(time.time())),
                        },
                    }
                }
            )
        )
    # Under torchrun, which shows one error in its summary, rank 0 speaks for all.
    return was_launched() or (bool(file) and os.environ.get('RANK', '0') != '0')


def follow_launcher() -> None:
    """Let the kernel stop this process when its launcher is killed, or it would run on alone."""
    if not was_launched() or not sys.platform.startswith('linux'):
        return
    import ctypes

    # PR_SET_PDEATHSIG of prctl(2). SIGTERM, since it saves the run.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHED]):
        sys.exit(128 + signal.SIGTERM)


def leave_group() -> None:
    """Leave the process group in good order, or NCCL complains when the process ends."""
    distributed = sys.modules.get('torch.distributed')
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
