"""Several gloo ranks on one machine, for the tests of data-parallel losses."""

from __future__ import annotations

import os
import sys
import traceback

import torch
import torch.multiprocessing


def _enter(rank: int, worker, folder: str, args: tuple) -> None:
    try:
        torch.set_num_threads(1)
        result = worker(rank, *args)
        torch.save(result, os.path.join(folder, f"result_{rank}.pt"))
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Without destructors: where the last reference to a gloo group is a DDP reducer's, its
    # destructor holds the GIL and waits for a thread that waits for the GIL (torch 2.13).
    os._exit(0)


def run_ranks(worker, folder, args: tuple = (), world: int = 2, timeout: float = 120) -> list:
    """worker(rank, *args) in `world` new processes: what each returned, in rank order.

    The worker initialises torch.distributed. Raises AssertionError where a rank fails or is not
    done after `timeout` seconds; no process outlives the call.
    """
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_enter, args=(rank, worker, str(folder), args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(timeout)
            assert process.exitcode == 0, f"rank {rank}: exit code {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(os.path.join(folder, f"result_{rank}.pt")) for rank in range(world)]
