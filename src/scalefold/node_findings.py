"""Facts of a node that decide how a job starts and how fast its network is, as rows of ``scalefold doctor``."""

import ctypes
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

from scalefold.run.compile_ahead import MANIFEST

Row = tuple[str, str, str]  # level (ok, note), topic, text
LIBRARIES = {"libibverbs.so.1": "libibverbs1", "librdmacm.so.1": "librdmacm1", "libmlx5.so.1": "ibverbs-providers"}


def rdma_rows(
    cards_dir: Path = Path("/sys/class/infiniband"),
    devices_dir: Path = Path("/dev/infiniband"),
    loads: Callable[[str], bool] | None = None,
) -> list[Row]:
    """What NCCL needs to use the node's network cards: their device files and the libraries of RDMA."""
    loads = loads or _loads
    cards = sorted(card.name for card in cards_dir.glob("*")) if cards_dir.is_dir() else []
    missing = [f"{library} (Debian: {package})" for library, package in LIBRARIES.items() if not loads(library)]
    if not cards:
        return [("note", "rdma", "no InfiniBand or RoCE card: NCCL between nodes would use sockets")]
    if not any(devices_dir.glob("uverbs*")):
        text = f"{', '.join(cards)}, but no {devices_dir}/uverbs*: a container needs MELLANOX_VISIBLE_DEVICES=all"
        return [("note", "rdma", f"{text}; NCCL would use sockets")]
    if missing:
        return [("note", "rdma", f"{', '.join(cards)}, but not {', '.join(missing)}: NCCL would use sockets")]
    return [("ok", "rdma", f"{', '.join(cards)}, with {', '.join(LIBRARIES)}")]


def kernel_cache_rows(cache: Path, triton_version: str | None = None) -> list[Row]:
    """How many kernels of each system that was compiled ahead the cache still holds; others are compiled at a start."""
    file = cache / MANIFEST
    if not file.is_file():
        return [("note", "kernels", f"{cache} holds none that `scalefold compile` made: a first start compiles them")]
    installed = triton_version or _version("triton")
    rows: list[Row] = []
    for system, made in json.loads(file.read_text(encoding="utf-8")).items():
        hits = sum(any((cache / folder).glob("*")) for folder in made["folders"])
        misses = len(made["folders"]) - hits
        if made["triton"] != installed:
            hits, misses = 0, len(made["folders"])
            why = f"; they are of Triton {made['triton']}, installed is {installed}: run `scalefold compile` again"
        else:
            why = "; run `scalefold compile` again" if misses else ""
        rows.append(("note" if misses else "ok", "kernels", f"{system}: {hits} hits, {misses} misses in {cache}{why}"))
    return rows


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
