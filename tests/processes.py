"""Run a function on several ranks of a gloo group, in forked processes of this machine; environments of others."""

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def compiling_environment(cache: Path | None = None) -> dict[str, str]:
    """The environment of a process that compiles Triton kernels, where tests interpret them; ``cache``: to there."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return own if cache is None else own | {"TRITON_CACHE_DIR": str(cache)}


def script_environment(repository: Path, cache: Path) -> dict[str, str]:
    """That of a process which compiles, to ``cache``, and imports scripts of measurement."""
    own = compiling_environment(cache)
    scripts = str(repository / "benchmarks" / "measure")
    return own | {"PYTHONPATH": os.pathsep.join([scripts, own.get("PYTHONPATH", "")])}


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600, join: bool = True
) -> list[Any]:
    """Results of ``function(rank, *args)`` of all ranks; the first failing rank's traceback is raised.

    Processes are forked, so ``function`` may be a closure; results must be picklable (tensors as NumPy arrays).
    ``join=False`` only sets the environment that torchrun would set; the function joins the group itself.
    """
    context, port = mp.get_context("fork"), free_port()
    queue = context.Queue()
    processes = [
        context.Process(target=_child, args=(queue, function, rank, world_size, port, args, join))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = [queue.get(timeout=timeout_s) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    errors = [text for _, text, _ in answers if text]
    if errors:
        raise AssertionError(errors[0])
    return [result for _, _, result in sorted(answers, key=lambda answer: answer[0])]


def _child(
    queue: Any, function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple, join: bool
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        torch.set_num_threads(1)
        if join:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = function(rank, *args)
        if join:
            dist.barrier()
            dist.destroy_process_group()
        queue.put((rank, None, result))
    except BaseException:
        queue.put((rank, f"rank {rank}:\n{traceback.format_exc()}", None))
