"""How do the tests run in several real processes? `run(world_size, case, ...)` calls a function on each rank.

The processes of one world size start once a session and take case after case; torch is imported once, in the server
that they are forked from. A case is a function at the top of a module, called as `case(*args)` on each rank; its
results come back in a list by rank. A rank that raises fails the test with its traceback; one that hangs fails it with
the stack of every rank.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds for one case; a case that compiles asks for more
GRACE = 3.0  # seconds that the other ranks get once one has failed

# Not forked where there is CUDA: importing the compiler initialises it, and it does not survive a fork.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp", "torch.distributed.tensor"]
)
_pools: dict[tuple[int, str], Pool] = {}


class Pool:
    """The processes of one world size and backend."""

    def __init__(self, world_size: int, backend: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="magi_dist_")
        self.connections = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_work, args=(rank, world_size, backend, self.folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, case: Callable, args: tuple, timeout: float) -> list[Any]:
        __tracebackhide__ = True
        for connection in self.connections:
            connection.send((case.__module__, case.__qualname__, args))
        results, failures = {}, {}
        deadline = time.monotonic() + timeout
        waiting = dict(zip(self.connections, range(len(self.connections))))
        while waiting and time.monotonic() < deadline:
            for connection in multiprocessing.connection.wait(list(waiting), timeout=deadline - time.monotonic()):
                rank = waiting.pop(connection)
                try:
                    passed, value = connection.recv()
                except EOFError:
                    self.processes[rank].join(GRACE)
                    passed, value = False, f"the process ended, exit code {self.processes[rank].exitcode}"
                (results if passed else failures)[rank] = value
                if not passed:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures or waiting:
            stacks = self.stacks(sorted(waiting.values()))
            self.close()
            reports = [f"rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())]
            reports += [f"rank {rank} did not finish:\n{text}" for rank, text in stacks.items()]
            raise AssertionError("\n\n".join(reports))
        return [results[rank] for rank in range(len(self.processes))]

    def stacks(self, ranks: list[int]) -> dict[int, str]:
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0 if ranks else 0.0)
        return {rank: Path(self.folder.name, f"stacks_{rank}").read_text() for rank in ranks}

    def close(self) -> None:
        for connection in self.connections:
            connection.close()  # ends a process that waits for a case
        deadline = time.monotonic() + 1.0
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self.folder.cleanup()


def run(world_size: int, case: Callable, *args: Any, timeout: float = TIMEOUT, backend: str = "gloo") -> list[Any]:
    """`case(*args)` on each of `world_size` ranks; the results by rank. With "nccl" each rank has a GPU of its own."""
    __tracebackhide__ = True
    key = world_size, backend
    if key not in _pools:
        _pools[key] = Pool(world_size, backend)
    try:
        return _pools[key].run(case, args, timeout)
    except AssertionError:
        del _pools[key]  # its processes may be in the middle of a collective
        raise


@atexit.register
def _close() -> None:
    for pool in _pools.values():
        pool.close()


def _work(
    rank: int, world_size: int, backend: str, folder: str, connection: multiprocessing.connection.Connection
) -> None:
    stacks = open(Path(folder, f"stacks_{rank}"), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    sys.path.insert(0, str(Path(__file__).parent))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        try:
            module, name, args = connection.recv()
        except EOFError:
            return
        try:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.manual_seed(0)
            result = True, getattr(importlib.import_module(module), name)(*args)
            dist.barrier()
        except BaseException:
            result = False, traceback.format_exc()
        connection.send(result)
