"""Several processes of one run: start them, or join those that torchrun or Slurm started.

PyTorch's elastic launcher (what ``torchrun`` is) does the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.engine import compat
from mmfinetune.utils.errors import UserError, stopped_by
from mmfinetune.utils.processes import end_with_parent, environment
from mmfinetune.utils.text import plural

if TYPE_CHECKING:
    from mmengine.config import Config

# Process id of the launcher, which shows the errors of the processes that it started.
LAUNCHED = 'MMFINETUNE_LAUNCHED'
# This machine's place in a run on several: rank/count@host:port; see tools/dist_train.sh.
NODE = 'MMFINETUNE_NODE'
# A step and a checkpoint on a slow disk must fit in between the signal and the kill.
STOP_TIMEOUT_S = 120
# Machines of one job may start that far apart.
RENDEZVOUS_TIMEOUT_S = 900
# Others wait while rank 0 prepares data, fetches weights or computes AP: longer than the 10 minutes
# after which NCCL takes a process for dead. `env_cfg.dist_cfg.timeout` sets another.
GROUP_TIMEOUT_S = 3600
# The agent gives the others 30 s after the first failure, then kills them.
TERM_GRACE_S = 25


@dataclasses.dataclass(frozen=True)
class Node:
    """This machine among those of a run."""

    rank: int = 0
    count: int = 1
    host: str = '127.0.0.1'
    port: int = 0

    @staticmethod
    def of_environment() -> Node:
        """The place that tools/dist_train.sh gives this machine; else it is the only one."""
        text = os.environ.get(NODE)
        if not text:
            return Node()
        found = re.fullmatch(r'(\d+)/(\d+)@(\S+):(\d+)', text)
        if not found or not int(found[1]) < int(found[2]) or not 0 < int(found[4]) < 2**16:
            raise UserError('run-node', name=NODE, value=text)
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
    """Give a task that ``srun`` started the environment that torchrun would give it."""
    env = os.environ
    if 'LOCAL_RANK' in env or _slurm_tasks() <= 1:
        return
    nodes = env.get('SLURM_STEP_NODELIST') or env.get('SLURM_JOB_NODELIST', '')
    if 'MASTER_ADDR' not in env:
        command = ['scontrol', 'show', 'hostnames', nodes]
        try:
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            env['MASTER_ADDR'] = shown.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise UserError('run-slurm-first-node', nodes=nodes, reason=str(error)) from None
    # The same for all tasks, and another one for each job on a shared node.
    env.setdefault('MASTER_PORT', str(20000 + int(env.get('SLURM_JOB_ID', 0)) % 10000))
    # With --gpus-per-task each task sees its own GPU alone.
    local = '0' if re.fullmatch(r'[^,]+', env.get('CUDA_VISIBLE_DEVICES', '')) else env['SLURM_LOCALID']
    env.update(RANK=env['SLURM_PROCID'], LOCAL_RANK=local, WORLD_SIZE=str(_slurm_tasks()))


def processes(gpus: str | None) -> int:
    """How many processes to start, on all machines together.

    Args:
        gpus: GPUs of this machine: ``'all'`` visible ones (or None), or a number; without a GPU, processes on the CPU.
    """
    machines = Node.of_environment().count
    count = None
    if gpus not in (None, 'all'):
        if not re.fullmatch(r'0*[1-9][0-9]{0,3}', gpus):
            raise UserError('run-gpus', gpus=gpus)
        count = int(gpus)
        if count == 1:
            return machines
    import torch

    # Counted without a CUDA context in the process that only starts others.
    visible = torch.cuda.device_count()
    if count is None:
        return machines * max(1, visible)
    if visible and count > visible:
        raise UserError('run-too-few-gpus', gpus=count, visible=plural(visible, 'GPU'))
    return machines * count


def take_place() -> int:
    """The number of processes of the run, and that there is a GPU for this one; before MMEngine looks for it."""
    adopt_slurm()
    world = int(os.environ.get('WORLD_SIZE', 1))
    if 'LOCAL_RANK' not in os.environ or world == 1:
        return 1
    import torch

    local, visible = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if 0 < visible <= local:
        raise UserError('run-process-without-gpu', local=local, visible=visible)
    return world


def join_group(cfg: Config) -> int:
    """Join the other processes, if torchrun or Slurm started this one; return their number.

    The group is made here and not by the Runner, which calls CUDA even for gloo. The settings that the
    Runner needs for several processes are those of `config.resolve.set_processes`.
    """
    world = take_place()
    if world == 1:
        return 1
    import torch
    from mmengine.dist import init_dist, is_distributed

    # MMEngine passes the old name; the new one is not in all supported versions.
    warnings.filterwarnings('ignore', '.broadcast_buffers. is deprecated', FutureWarning)
    if is_distributed():
        return world
    settings = {'timeout': GROUP_TIMEOUT_S, **(cfg.env_cfg.get('dist_cfg') or {})}
    try:
        if torch.cuda.is_available():
            init_dist('pytorch', **settings)
        else:
            torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=settings['timeout']))
    except torch.distributed.DistNetworkError as error:
        raise _no_meeting(error, os.environ.get('MASTER_ADDR', '?'), os.environ.get('MASTER_PORT', '?')) from error
    return world


def launch(count: int, argv: Sequence[str]) -> int:
    """Run ``python <argv>`` in several processes of one run; the first real error stops all and is shown once.

    Args:
        count: Number of processes on all machines together; this one starts its share.

    Returns:
        Exit code: 0, 2 after a UserError, 128 + the signal after a stop, else that of a crash, 70.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    node = Node.of_environment()
    local = count // node.count
    if node.count > 1:
        share = f'Machine {node.rank} of 0 to {node.count - 1}: {local} of {count} processes'
        print(f'{share}; they meet at {node.host}:{node.port}', flush=True)
    with tempfile.TemporaryDirectory(prefix='mmfinetune_') as folder, _quiet_launcher(local):
        try:
            elastic_launch(_launch_config(node, local, folder), sys.executable)(*argv)
        except ChildFailedError as error:
            return _show(error.failures, alone=node.count == 1)
        except SignalException as error:
            # What went wrong while they stopped, a full disk for example, or where they did.
            found = sorted(filter(None, map(compat.read_error_file, Path(folder).rglob('error.json'))))
            stop, told = stopped_by(error.sigval), [text for _, text in found]
            _say(next(iter([*(text for text in told if not text.startswith(stop)), *told]), stop))
            return 128 + int(error.sigval)
        except (DistNetworkError, RendezvousError) as error:
            raise _no_meeting(error, node.host, node.port) from error
    return 0


def _launch_config(node: Node, processes_here: int, folder: str) -> Any:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # Port 0: whichever is free, so that two runs on one machine do not meet.
    meet: dict[str, Any] = dict(rdzv_backend='c10d', rdzv_endpoint='127.0.0.1:0', local_addr='127.0.0.1')
    if node.count > 1:
        meet = dict(rdzv_backend='static', rdzv_endpoint=f'{node.host}:{node.port}')
        meet['rdzv_configs'] = {'rank': node.rank, 'timeout': RENDEZVOUS_TIMEOUT_S}
    meet |= dict(min_nodes=node.count, max_nodes=node.count, nproc_per_node=processes_here, max_restarts=0)
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    if 'shutdown_timeout' in known:
        meet['shutdown_timeout'] = STOP_TIMEOUT_S  # before PyTorch 2.12 it is always 30 s
    if 'signals_to_handle' in known and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        meet['signals_to_handle'] = 'SIGTERM,SIGINT,SIGQUIT'  # nohup
    return LaunchConfig(run_id='mmfinetune', logs_specs=DefaultLogsSpecs(log_dir=folder), **meet)


@contextlib.contextmanager
def _quiet_launcher(count: int) -> Iterator[None]:
    """Set the environment of so many processes, and hide elastic's own account of a failure."""
    # Each process would else start as many threads as there are cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = str(max(1, (cores or 1) // count))
    given = {name: os.environ.get(name, threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    with environment({LAUNCHED: str(os.getpid()), **given}):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _no_meeting(error: Exception, host: str, port: int | str) -> UserError:
    """The error where the processes of a run did not find each other."""
    if compat.is_port_taken(error):
        return UserError('run-port-taken', host=host, port=port)
    return UserError('run-no-meeting', host=host, port=port, reason=str(error).strip().splitlines()[0])


def _blame(failure: Any, started: float) -> tuple[int, float]:
    """Sort key of a failure: from 0 for a cause to 3 for a consequence, then its time."""
    found = compat.read_error_file(failure.error_file)
    seconds = found[0] if found else failure.timestamp
    if found and failure.exitcode == 2:
        return 0, seconds
    # Killed from outside, it had no chance to write anything down, while its peers complain of
    # the lost connection; NCCL ends these by SIGABRT, the agent by SIGTERM and then SIGKILL.
    by_peers = failure.exitcode >= 0 or -failure.exitcode in (signal.SIGTERM, signal.SIGABRT)
    if not by_peers and failure.timestamp < started + TERM_GRACE_S:
        return 1, seconds
    return 3 if failure.exitcode == -signal.SIGTERM else 2, seconds


def _show(failures: dict[int, Any], alone: bool = True) -> int:
    """Print the first of elastic's failures by rank that no other caused; its exit code. ``alone``: on one machine."""
    started = min(failure.timestamp for failure in failures.values())
    rank, failure = min(failures.items(), key=lambda item: (*_blame(item[1], started), item[0]))
    found = compat.read_error_file(failure.error_file)
    if failure.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP):
        _say(found[1] if found else stopped_by(failure.exitcode - 128))
        return failure.exitcode
    error = None
    if failure.exitcode < 0:
        error = UserError('run-process-killed', rank=rank, signal=signal.Signals(-failure.exitcode).name)
    elif not found:
        error = UserError('run-process-ended', rank=rank, exit=failure.exitcode)
    elif not alone and compat.is_connection_lost(found[1]):
        error = UserError('run-machine-lost', reason=found[1].strip().splitlines()[-1])
    _say(f'error[{error.code}]: {error}' if error else (found or ('', ''))[1])
    # 1 is a tool's answer, and a signal no exit code: both are crashes here.
    return failure.exitcode if failure.exitcode > 1 else os.EX_SOFTWARE


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed
        print(text, file=sys.stderr, flush=True)


def report(text: str, error: BaseException) -> bool:
    """Leave an error, with the text to show, to the launcher; whether that shows it, so that this process need not."""
    file = os.environ.get(compat.ERROR_FILE)
    if file:
        compat.write_error_file(file, text, error)
    # Under torchrun, which shows one error in its summary, rank 0 speaks for all.
    launcher_lives = os.environ.get(LAUNCHED) == str(os.getppid())
    return launcher_lives or (bool(file) and os.environ.get('RANK', '0') != '0')


def follow_launcher() -> None:
    """Let this process stop when its launcher, also torchrun, is killed, or it would run on alone."""
    if was_launched() or 'TORCHELASTIC_RUN_ID' in os.environ:
        # SIGTERM, since it saves the run.
        end_with_parent(int(os.environ.get(LAUNCHED) or os.getppid()), signal.SIGTERM)


def leave_group() -> None:
    """Leave the process group in good order, or NCCL complains when the process ends."""
    distributed = sys.modules.get('torch.distributed')
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        # The model and its reducer hold the group in circles. Gloo's threads, if they live on until the interpreter
        # is taken down, abort the process then: 2 of 40 small programs, and none of 40 with this.
        gc.collect()
