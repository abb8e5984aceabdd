"""Work on many files in several processes, in order and with a progress bar."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from mmfinetune.utils import console, processes
from mmfinetune.utils.errors import Message, UserError

Item = TypeVar('Item')
Result = TypeVar('Result')
_work: Callable[[Any], Any]
_done: Callable[[], None]


def _start(work: Callable[[Any], Any], parent: int, readers: processes.Readers, slot: Any) -> None:
    global _work, _done
    processes.end_with_parent(parent)
    # Ctrl-C reaches every process of the terminal, and Slurm signals all; only the parent answers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with slot.get_lock():
        mine = slot.value
        slot.value += 1
    _work, _done = work, readers.note(mine)


def _do(chunk: Sequence[Any]) -> list[Any]:
    results = list(map(_work, chunk))
    _done()
    return results


def _awaited(future: Future, readers: processes.Readers) -> Any:
    """The result of a piece of work; says, and then ends, that none comes."""
    start, told = time.monotonic(), False
    while not wait([future], timeout=1).done:
        waited = time.monotonic() - start
        facts: dict[str, Any] = {'seconds': waited, 'files': ', '.join(readers.files()) or '?'}
        if waited > processes.PATIENCE_S:
            raise UserError('workers-hang', **facts)
        if waited > processes.TELL_S and not told:
            told = True
            tqdm.write(f'note: {Message("workers-wait", **facts)}', file=sys.stderr)
    return future.result()


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, chunk: int, **bar: Any
) -> Iterator[Result]:
    """The results for all items, in their order whatever the number of workers.

    Args:
        work: Function or object to call; what it holds may be large, since forked processes share it.
        items: What it is called with.
        workers: Number of processes; 1 works in this one.
        chunk: Items that a process takes at a time.
        **bar: For `console.bar`, e.g. ``desc`` and ``wanted``.

    Raises:
        UserError: A worker process was killed, or hangs.
    """
    bar = dict(total=len(items), unit='img', **bar)
    chunks = (items[k : k + chunk] for k in range(0, len(items), chunk))
    workers = min(workers, -(-len(items) // chunk))
    # Forked processes share memory until they write to it, as the collector does: not to what is frozen.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    pool: ProcessPoolExecutor | None = None
    if workers > 1:
        with contextlib.suppress(OSError):  # processes cannot share memory here: /dev/shm is full or read-only
            readers = processes.Readers(workers)
            initial = (work, os.getpid(), readers, context.Value('i', 0))
            pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=initial)
    if pool is None:
        with console.bar(**bar) as shown:
            for item in items:
                yield work(item)
                shown.update()
        return
    # A thread of an earlier progress bar; forking with threads is unsafe.
    if tqdm.monitor:
        tqdm.monitor.exit()
    gc.freeze()
    with pool:
        try:
            # So many that no worker waits, so few that the results of a large set fit in memory.
            waiting = [pool.submit(_do, part) for part in islice(chunks, 4 * workers)]
            # Made after the workers, since it starts that thread again.
            with console.bar(**bar) as shown:
                while waiting:
                    done = _awaited(waiting.pop(0), readers)
                    waiting += [pool.submit(_do, part) for part in islice(chunks, 1)]
                    yield from done
                    shown.update(len(done))
        except BaseException as error:
            # One that hangs would be waited for.
            readers.kill()
            if isinstance(error, BrokenProcessPool):
                raise UserError('worker-killed') from error
            raise
        finally:
            gc.unfreeze()
            pool.shutdown(wait=True, cancel_futures=True)
