"""Several processes that run one program together, each with devices of its own (`jax.distributed`)."""

import os
import re
import socket
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Shaped

from vecinfer_jax.errors import InputError

# The name of no address: the cluster says who the coordinator is, how many processes there are, and which this one is.
AUTO = "auto"
# Seconds that a process waits for the first one.
PATIENCE = 120


def join(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of `processes`, number `process`, that meet at the address `coordinator` of number 0.

    With "auto", all of it is asked of the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU). Called before anything
    else uses JAX's devices. Raises `InputError` where they do not meet.
    """
    if coordinator != AUTO:
        _check(coordinator, processes, process)
        if process:
            _await(coordinator)
    if jax.config.jax_cpu_collectives_implementation is None:  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(None if coordinator == AUTO else coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the processes did not meet at {coordinator}: {reason}") from None


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"coordinator={coordinator!r} must be host:port of process 0, or auto")
    if processes is None or process is None:
        raise InputError("say how many processes there are and which this one is, or coordinator=auto on a cluster")
    if not 0 <= process < processes:
        raise InputError(f"process={process} must be from 0 to {processes - 1}, one of {processes}")


def _await(coordinator: str) -> None:
    """Waits until process 0 listens; JAX itself would wait as long, and then abort."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise InputError(f"no process 0 at {coordinator} in {PATIENCE} s ({error}): start it there") from None
            time.sleep(0.2)


def leads() -> bool:
    """Whether this is the process that prints and writes: number 0, or the only one."""
    return jax.process_index() == 0


def told_by_first(tell: Callable[[], Shaped[np.ndarray, "*shape"]], like: Shaped[np.ndarray, "*shape"]) -> np.ndarray:
    """What `tell` gives on process 0, on all of them; an array as `like`. Its `InputError` is raised on all, too."""
    if jax.process_count() == 1:
        return tell()
    from jax.experimental import multihost_utils

    failure: InputError | None = None
    told = like
    if leads():
        try:
            told = tell()
        except InputError as error:
            failure = error
    failed, told = multihost_utils.broadcast_one_to_all((np.asarray(failure is not None), told))
    if failed:
        raise failure or InputError("process 0 could not go on: see what it says")
    return np.asarray(told)


def leave(status: int) -> int:
    """The exit status; where it says that something failed here alone, the others are not waited for."""
    if status and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
