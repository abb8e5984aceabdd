"""Work on many files in several processes, in order and with a progress bar."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from mmfinetune.utils.errors import UserError

Item = TypeVar('Item')
Result = TypeVar('Result')
_work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Ctrl-C reaches every process of the terminal; only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(chunk: Sequence[Any]) -> list[Any]:
    return list(map(_work, chunk))


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, chunk: int, **bar: Any
) -> Iterator[Result]:
    """The results for all items, in their order whatever the number of workers.

    Args:
        work: Function or object to call; what it holds may be large, since forked processes share it.
        items: What it is called with.
        workers: Number of processes; 1 works in this one.
        chunk: Items that a process takes at a time.
        **bar: For tqdm, e.g. ``desc`` and ``disable``.

    Raises:
        UserError: A worker process was killed.
    """
    bar = dict(total=len(items), unit='img', **bar)
    chunks = (items[k : k + chunk] for k in range(0, len(items), chunk))
    workers = min(workers, -(-len(items) // chunk))
    if workers <= 1:
        with tqdm(**bar) as shown:
            for item in items:
                yield work(item)
                shown.update()
        return
    # A thread of an earlier progress bar; forking with threads is unsafe.
    if tqdm.monitor:
        tqdm.monitor.exit()
    # Forked processes share memory until they write to it, as the collector does: not to what is frozen.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    gc.freeze()
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work,)) as pool:
        try:
            # So many that no worker waits, so few that the results of a large set fit in memory.
            waiting = [pool.submit(_do, part) for part in islice(chunks, 4 * workers)]
            # Made after the workers, since it starts that thread again.
            with tqdm(**bar) as shown:
                while waiting:
                    done = waiting.pop(0).result()
                    waiting += [pool.submit(_do, part) for part in islice(chunks, 1)]
                    yield from done
                    shown.update(len(done))
        except BrokenProcessPool as error:
            raise UserError('worker-killed') from error
        finally:
            gc.unfreeze()
            pool.shutdown(wait=True, cancel_futures=True)
