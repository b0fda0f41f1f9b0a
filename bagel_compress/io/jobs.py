"""Runs independent jobs in this process, in several processes, or on a Ray cluster (extra `ray`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from bagel_compress.errors import MissingExtraError

Executor = Literal["local", "ray"]
Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int = 1,
    executor: Executor = "local",
    cluster: str | None = None,
) -> Iterator[Result]:
    """Yields the result of `work` for each job, in order. `work` has to be a function at the top of a module.

    `cluster` is the address of a running Ray cluster. Raises MissingExtraError without the extra `ray`, and the errors
    of `work`.
    """
    if executor == "ray":
        return _on_ray(work, jobs, processes, cluster)
    return _in_processes(work, jobs, processes) if processes > 1 else map(work, jobs)


def _in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(work, jobs)


def _end_with_parent() -> None:
    """Ends this worker process when its parent ends, so that no worker survives a killed command."""
    import multiprocessing
    import threading
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(
    work: Callable[[Job], Result], jobs: Sequence[Job], processes: int, cluster: str | None
) -> Iterator[Result]:
    """Connects to the cluster at this address, or starts one on this machine with `processes` slots."""
    try:
        import ray
    except ImportError:
        raise MissingExtraError(
            "--executor ray needs the package ray; install it with: pip install 'bagel-compress[ray]'."
        ) from None

    own: dict[str, Any] = {} if cluster else {"num_cpus": processes, "include_dashboard": False}
    ray.init(address=cluster, log_to_driver=False, **own)
    try:
        for running in [ray.remote(work).remote(job) for job in jobs]:
            yield ray.get(running)
    finally:
        ray.shutdown()
