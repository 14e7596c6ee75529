"""Launch parameters of the Triton kernels: defaults in code, tuned tables per GPU kind, overrides for a sweep.

A kernel module registers each kernel once, with a function from the problem to its default launch parameters::

    tuning.register("layer_norm_forward", default=_forward_default)
    config = tuning.lookup("layer_norm_forward", rows=65536, c=128, dtype="bfloat16")
    kernel[grid](..., BLOCK=config["BLOCK"], num_warps=config["num_warps"], num_stages=config["num_stages"])

Fields name everything that the best choice depends on (shape class and storage type; the shares of DAP 1, 2, 4, 8
appear as shapes). ``lookup`` takes the first of: an active ``override``, the table of this GPU
(``tuned/<name of the device>.json``), the table of its compute capability (``tuned/sm_90.json``), the entry of the
nearest problem in those tables (the same but for its SIZES, see ``nearest``), the default. Nothing is timed here, so
nothing is tuned on the clock. A search (``scalefold tune``, which knows what is worth timing) times each
candidate under ``override`` and calls ``save``::

    with tuning.override("layer_norm_forward", config, **fields):
        milliseconds = time(...)

Modules with kernels also expose ``compile_cases() -> list[tuple[str, Callable[[], None]]]``: named calls of their
operations, forward and backward, on tensors of ``device="meta"`` at the benchmark's shapes.
``benchmarks/measure/compile_targets.py`` records the launches and compiles them for 8.0 and 9.0 without a GPU, so host
code of a kernel must run on meta tensors (no look at values, no call that needs a device).
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefold.errors import ConfigError
from scalefold.textfile import parse_json, read_text

Config = dict[str, int]
Fields = Mapping[str, int | str]

TABLES = Path(__file__).parent / "tuned"
SIZES = ("rows", "sequences", "n", "frames", "points")  # fields that say how much there is, not of what kind
SMALLEST_SIZE = 16  # smaller sizes take other paths in the kernels: they are never another problem's neighbour
FARTHEST = 3.0  # factors of two between neighbours, summed over SIZES: a share of DAP 8 still learns from DAP 1
FALLBACK_CAPABILITY = 90  # what interpreter runs and compile checks assume where there is no GPU
MOST_SHARED_ROWS = 128 * 128  # more rows give every multiprocessor a tile of 128 of them, whole columns or not
LEAST_SHARED_WEIGHT = 128 * 128  # elements; a smaller one costs a program little to read as a whole
NARROWEST_PART = 16  # columns of a product


_DIGITS = re.compile(r"[0-9]{1,18}")
_REPAIR = "remove it or run `scalefold tune`"


_defaults: dict[str, Callable[[Fields, int], Config]] = {}
_overrides: dict[str, Config] = {}
_assumed_capability: list[int] = []


def register(name: str, default: Callable[[Fields, int], Config]) -> None:
    """Declare kernel ``name``. default: problem fields and capability (80, 90) -> launch parameters."""
    if name in _defaults:
        raise ValueError(f"kernel {name!r} is registered twice")
    _defaults[name] = default


def ceil_div(a: int, b: int) -> int:
    """Number of tiles of b that cover a."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def registered() -> list[str]:
    """Names of all registered kernels."""
    return sorted(_defaults)


def problem_key(fields: Fields) -> str:
    """Text form of the fields in the tables, e.g. ``N=256 dtype=bfloat16``."""
    return " ".join(f"{name}={fields[name]}" for name in sorted(fields))


def lookup(name: str, **fields: int | str) -> Config:
    """Launch parameters of kernel ``name`` for a problem; KeyError if it is not registered."""
    key = problem_key(fields)
    if _overrides:
        found = _overrides.get(f"{name} {key}") or _overrides.get(name)
        if found is not None:
            return found
    return _resolved(name, key, tuple(sorted(fields.items())), capability())


@functools.lru_cache(maxsize=4096)
def _resolved(name: str, key: str, items: tuple[tuple[str, int | str], ...], target: int) -> Config:
    entries = table(target).get(name, {})
    entry = entries.get(key) or nearest(entries, dict(items))
    return dict(entry) if entry else _defaults[name](dict(items), target)


def nearest(entries: Mapping[str, Config], fields: Fields) -> Config | None:
    """The entry of the problem that differs least, in sizes only; the first of several that are equally near."""
    found, least = None, FARTHEST
    for key, config in entries.items():
        distance = _distance(dict(part.split("=", 1) for part in key.split()), fields)
        if distance < least or (found is None and distance == least):
            found, least = config, distance
    return found


def _distance(other: Mapping[str, str], fields: Fields) -> float:
    """Factors of two between the sizes of two problems; infinite between problems of different kinds."""
    if other.keys() != fields.keys():
        return math.inf
    total = 0.0
    for name, value in fields.items():
        if other[name] == str(value):
            continue
        if name not in SIZES or min(int(other[name]), int(value)) < SMALLEST_SIZE:
            return math.inf
        total += abs(math.log2(int(other[name]) / int(value)))
    return total


@contextmanager
def override(name: str, config: Config, **fields: int | str) -> Iterator[None]:
    """Use ``config`` for kernel ``name`` inside the block: for one problem, or for all if no field is given."""
    if name not in _defaults:
        raise KeyError(f"no kernel {name!r}; registered: {', '.join(registered())}")
    key = f"{name} {problem_key(fields)}" if fields else name
    previous = _overrides.get(key)
    _overrides[key] = config
    try:
        yield
    finally:
        if previous is None:
            del _overrides[key]
        else:
            _overrides[key] = previous


@contextmanager
def assume_capability(target: int) -> Iterator[None]:
    """Choose launch parameters for another GPU (80, 90), to compile for it where it is absent."""
    _assumed_capability.append(target)
    try:
        yield
    finally:
        _assumed_capability.pop()


def capability() -> int:
    """Compute capability that launch parameters are chosen for: 90 for 9.0; FALLBACK_CAPABILITY without a GPU."""
    return _assumed_capability[-1] if _assumed_capability else _device_capability()


def stand_in() -> str | None:
    """Kind of the devices that stand for a GPU that is compiled for: ``meta``; None where nothing is assumed."""
    return "meta" if _assumed_capability else None


@functools.cache
def _device_capability() -> int:
    if not torch.cuda.is_available():
        return FALLBACK_CAPABILITY
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@functools.cache
def device_kind() -> str:
    """File stem of this GPU's table, e.g. ``nvidia_h200``; ``sm_90`` without a GPU."""
    if not torch.cuda.is_available():
        return f"sm_{FALLBACK_CAPABILITY}"
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


@functools.cache
def table(target: int) -> dict[str, dict[str, Config]]:
    """Tuned entries {kernel: {problem key: launch parameters}}: those of the device over those of its capability."""
    stems = [f"sm_{target}"]
    if target == _device_capability():
        stems.append(device_kind())
    merged: dict[str, dict[str, Config]] = {}
    for stem in dict.fromkeys(stems):
        for name, entries in _read(stem).items():
            merged.setdefault(name, {}).update(entries)
    return merged


def _read(stem: str) -> dict[str, dict[str, Config]]:
    path = TABLES / f"{stem}.json"
    return read_table(path) if path.is_file() else {}


def read_table(path: Path) -> dict[str, dict[str, Config]]:
    """A file of tuned entries. Raises ConfigError naming the file and the entry that is none."""
    try:
        tables = parse_json(read_text(path, ConfigError))
    except ValueError as error:
        raise ConfigError(f"{path}: no table of launch parameters ({error}); {_REPAIR}") from None
    for name, entries in _items(tables, path):
        for key, config in _items(entries, f"{path}: {name}"):
            values = list(_items(config, f"{path}: {name}: {key}"))
            fields = [part.partition("=") for part in key.split()]
            bad_fields = [f for f, _, value in fields if not value or (f in SIZES and not _DIGITS.fullmatch(value))]
            if bad_fields or any(type(value) is not int for _, value in values):
                raise ConfigError(f"{path}: {name}: `{key[:80]}` is no problem with launch parameters; {_REPAIR}")
    return tables


def _items(value: object, place: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: found {type(value).__name__}, a JSON object was expected; {_REPAIR}")
    yield from value.items()


def save(stem: str, entries: Mapping[str, Mapping[str, Config]]) -> Path:
    """Merge ``entries`` into ``tuned/<stem>.json`` (older problems stay) and use them from now on."""
    merged = _read(stem)
    for name, chosen in entries.items():
        merged.setdefault(name, {}).update({key: dict(config) for key, config in chosen.items()})
    path = TABLES / f"{stem}.json"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    table.cache_clear()
    _resolved.cache_clear()
    return path


def row_fields(count: int, dtype: torch.dtype, **sizes: int) -> dict[str, int | str]:
    """Fields of a row-wise problem for ``tuning.lookup``; row counts between powers of two share an entry."""
    return {"rows": 1 << (count - 1).bit_length(), "dtype": str(dtype).removeprefix("torch."), **sizes}


def attention_fields(q: Tensor, biased: bool) -> dict[str, int | str]:
    """Fields of an attention for ``lookup``, q: [B, S, N, H, D]; sizes of evaluations are rounded up: short tables."""
    batch, rows, n, heads, width = q.shape
    return {
        "batch": batch,
        "rows": power_of_two(rows),
        "n": max(16, power_of_two(n)),
        "heads": heads,
        "d": width,
        "bias": int(biased),
        "dtype": str(q.dtype).removeprefix("torch."),
    }


def tile_config(values: Sequence[int]) -> Config:
    """Launch parameters of a kernel of tiles from (rows, columns, warps, stages)."""
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))


def tile_default(default: dict[int, tuple[int, ...]]) -> Callable[[Fields, int], Config]:
    """Default launch parameters by the largest width ``c``, made smaller for fp32 and capabilities below 9.0."""

    def choose(fields: Fields, capability: int) -> Config:
        chosen = tile_config(next(values for width, values in sorted(default.items()) if int(fields["c"]) <= width))
        if fields["dtype"] == "float32":  # twice the bytes per element: smaller tiles
            chosen["BLOCK_M"] = min(chosen["BLOCK_M"], 32)
            chosen["BLOCK_N"] = min(chosen["BLOCK_N"], 32)
        if capability < 90:  # 163 KB of shared memory instead of 227, and no operands in registers
            chosen["BLOCK_M"] = min(chosen["BLOCK_M"], 64)
            chosen["BLOCK_N"] = min(chosen["BLOCK_N"], 64)
            chosen["num_stages"] = min(chosen["num_stages"], 2)
        return chosen

    return choose


def register_tiles(name: str, default: dict[int, tuple[int, ...]]) -> None:
    """Register a kernel of tiles: tuples are (rows, columns, warps, stages), defaults by the largest width ``c``."""
    register(name, tile_default(default))


def chosen_tiles(name: str, x: Tensor, n: int, limit: int, c: int | None = None) -> Config:
    """Launch parameters of kernel ``name`` for the rows of x: [*, c] and products of width n.

    ``limit``: most columns that a tile may have; ``c``: where another width than that of x is the larger one.
    """
    config = lookup(name, **row_fields(x.shape[:-1].numel(), x.dtype, c=c or x.shape[-1], n=n))
    return {**config, "BLOCK_N": min(config["BLOCK_N"], limit)}


def register_parts(name: str) -> None:
    """Register whether a kernel's grid has a second dimension over parts of the output columns: by default it has not.

    {"PARTS": 1}: the tiles of the kernel without parts; with PARTS > 1 come the tiles of the grid that has them.
    """
    register(name, lambda fields, capability: {"PARTS": 1})


def chosen_parts(
    name: str,
    tiles: str,
    x: Tensor,
    n: int,
    limit: int,
    c: int | None = None,
    columns: int | None = None,
    blocked: bool = True,
) -> Config:
    """``chosen_tiles`` of ``tiles`` and PARTS: how many programs share out the columns of a tile of rows.

    That is worth a look (``name``) where rows are few: each program reads its part of the weight alone. ``columns``: of
    the output, where these are not n. ``blocked``: tiles block them, never across a part; else another width.
    """
    count, c = x.shape[:-1].numel(), c or x.shape[-1]
    if count <= MOST_SHARED_ROWS and n * c >= LEAST_SHARED_WEIGHT:
        config = lookup(name, **row_fields(count, x.dtype, c=c, n=n))
        if "BLOCK_M" in config:
            even = (columns or n) & -(columns or n)  # the largest power of two that divides it
            parts = min(config["PARTS"], max(1, even // NARROWEST_PART))
            most = min(limit, even // parts) if blocked else limit
            return {**config, "PARTS": parts, "BLOCK_N": min(config["BLOCK_N"], most)}
    return {"PARTS": 1, **chosen_tiles(tiles, x, n, limit, c)}
