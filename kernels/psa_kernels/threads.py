"""Independent tasks on several CPU threads, each of which runs its tensor operations alone.

PyTorch splits every operation among all its threads and waits for the slowest. Thousands of small operations then pay
for as many waits, each a scheduler's time slice long as soon as another process wants a core. Splitting the tasks
instead of the operations leaves one wait at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Generic, TypeVar

import torch

Task = TypeVar("Task")


def run_tasks(tasks: Iterable[Task], worker: Callable[[Iterator[Task]], None], device: torch.device) -> None:
    """Hand out `tasks` to concurrent calls of `worker`, or to a single call where `device` is not a CPU.

    Args:
        tasks: what is to be done, in any order.
        worker: does every task that the iterator it is given yields; it may keep buffers from one task to the next.
        device: where the tasks compute.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        worker(iter(tasks))
        return
    shared = _Shared(iter(tasks))
    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        # Both modes belong to a thread; tensors made in inference mode may only be written to in inference mode.
        with torch.inference_mode(inference), torch.no_grad():
            worker(shared)

    futures = [_pool(threads).submit(run) for _ in range(threads)]
    for future in futures:
        future.result()


class _Shared(Generic[Task]):
    """One iterator that several threads draw from."""

    def __init__(self, source: Iterator[Task]) -> None:
        self._source = source
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        with self._lock:
            return next(self._source)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads run PyTorch operations single-threaded; the caller's own setting stays as it is."""
    ready = threading.Barrier(threads + 1)

    def prepare() -> None:
        torch.get_num_threads()  # the first query would otherwise reset the number set below
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="psa", initializer=prepare)
    for _ in range(threads):
        pool.submit(lambda: None)  # none is idle before all have started, so each submission starts one
    ready.wait()
    torch.set_num_threads(threads)
    return pool
