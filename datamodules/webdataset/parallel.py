"""The same work for many shards, in processes."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int) -> Iterator[Result]:
    """Yield the result of each job, in their order, with a few of them ahead.

    Args:
        function: Of a module, or a partial of one, so that processes can import it.
        jobs: Taken as they are needed.
        num_workers: Processes; 0 works in this one.
    """
    if num_workers == 0:
        yield from map(function, jobs)
        return
    # A fork of this process would take its threads' locks along. The server imports once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])
    ahead: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent) as pool:
        try:
            for job in jobs:
                ahead.append(pool.submit(function, job))
                if len(ahead) > 2 * num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone; it would wait for work for ever, or write next to a new run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
