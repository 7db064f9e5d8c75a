"""The same cells on a Ray cluster (an extra: ``pip install 'normsurgeon[ray]'``)."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any

import torch

from normsurgeon.errors import EnvironmentProblem, UsageError
from normsurgeon.study.engines import Told, Work
from normsurgeon.study.records import Cell, Outcome


def on_ray(
    work: Work, cells: Sequence[Cell], told: Told, jobs: int | None = None, address: str | None = None
) -> Generator[Outcome, None, None]:
    """On the cluster at ``address`` (``auto``, ``ray://host:10001``), or on one that is started here.

    jobs  cells at once; default: as many as the cluster has CPUs (or GPUs) for

    :raises EnvironmentProblem: Ray is not installed, or cannot start.
    :raises UsageError: no cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem("--engine ray takes Ray; try: pip install 'normsurgeon[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _start(ray, jobs, address)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) and work.device in (None, "cuda") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_one)
        waiting = list(reversed(cells))
        most = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, Cell] = {}
        while waiting or running:
            while waiting and len(running) < most:
                cell = waiting.pop()
                running[remote.remote(work, cell)] = cell
                told(cell, 0.0)
            done, _ = ray.wait(list(running))
            for reference in done:
                cell = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield Outcome(cell, "failed", f"Ray: {' '.join(str(error).split())[:300]}")
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any, jobs: int | None, address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 starves workers beside anything else that computes
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except ConnectionError as error:
        raise UsageError(f"there is no Ray cluster at {address}; try --ray-address auto, or none") from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(f"Ray cannot start ({type(error).__name__}: {text}); try --engine local") from error


def _one(work: Work, cell: Cell) -> Outcome:
    torch.set_num_threads(1)
    return work.do(cell)
