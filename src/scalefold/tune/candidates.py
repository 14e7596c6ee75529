"""What a search for launch parameters may try, per kernel of ``scalefold.kernels.tuning``.

The lists hold what has won or come close on some GPU at some shape; a kernel without a list here is not searched.
``space`` is the whole grid around them.
"""

import itertools
from collections.abc import Callable, Iterable

from scalefold.kernels.gradients.weight_gradient import NARROWEST
from scalefold.kernels.hopper.attention import forward_default, keys_default, rows_default
from scalefold.kernels.tuning import NARROWEST_PART, Config, Fields, tile_config

Tile = tuple[int, int, int, int]  # rows, columns, warps, stages
PARTS = (2, 4, 8)  # of the output columns
WIDEST_BLOCK = 256  # of a weight's rows that the copy engine takes at once (CUDA programming guide)

NORM_LINEAR_FORWARD: tuple[Tile, ...] = (
    *((64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 4, 2), (64, 128, 8, 2)),
    *((128, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
NORM_LINEAR_BACKWARD: tuple[Tile, ...] = (
    *((32, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3)),
    *((64, 128, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
)
GATED_OUTPUT: tuple[Tile, ...] = (
    *((32, 32, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2)),
    *((64, 128, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
)
TRIANGLE: tuple[Tile, ...] = (
    *((32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (64, 16, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 4, 3)),
    *((64, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
)
OUTER_PRODUCT: tuple[Tile, ...] = (
    *((64, 32, 4, 4), (64, 64, 4, 3), (64, 64, 8, 4), (64, 128, 4, 2), (64, 128, 8, 3)),
    *((128, 32, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
TRANSITION_FORWARD: tuple[Tile, ...] = (
    *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2)),
    *((128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
TRANSITION_FUSED: tuple[Tile, ...] = (
    *((32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 3)),
    *((64, 64, 8, 1), (64, 64, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2), (128, 64, 8, 2)),
)
TRANSITION_BY_LIBRARY: tuple[Tile, ...] = (
    *((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
)
RECOMPUTED_WEIGHTS: tuple[Tile, ...] = (
    *((32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3)),
)
COLUMNS: tuple[Tile, ...] = (
    *((64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (128, 32, 8, 3)),
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
INPUT_GRADIENT_COLUMNS: tuple[Tile, ...] = (
    *((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3), (64, 64, 8, 4)),
    *((64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 8, 4)),
    *((128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4)),
    *((128, 128, 8, 2), (128, 128, 8, 3)),
)
WEIGHT_GRADIENT: tuple[Tile, ...] = (
    *((64, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (32, 64, 4, 4), (128, 64, 8, 2), (32, 128, 8, 4)),
)


WEIGHT_GRADIENT_COPIED: tuple[Tile, ...] = (
    *((64, 64, 4, 4), (64, 64, 4, 5), (64, 64, 8, 5), (128, 64, 4, 3), (128, 64, 4, 4), (64, 128, 4, 4)),
    *((64, 128, 8, 5), (128, 128, 4, 3)),
)


def _tiles(tiles: Iterable[Tile]) -> Callable[[Fields], list[Config]]:
    """The same tiles for every problem."""
    return lambda fields: [tile_config(tile) for tile in tiles]


def _parts(columns: Callable[[Fields], list[tuple[int, Tile]]]) -> Callable[[Fields], list[Config]]:
    """One program for all columns, and the grids over parts of them."""

    def configs(fields: Fields) -> list[Config]:
        grids = dict.fromkeys(columns(fields))
        return [{"PARTS": 1}, *({"PARTS": parts, **tile_config(tile)} for parts, tile in grids)]

    return configs


def _own_columns(widths: int) -> Callable[[Fields], list[tuple[int, Tile]]]:
    """Blocks of a part of ``widths`` times n columns, and the whole part as one, which has nothing to load ahead."""

    def columns(fields: Fields) -> list[tuple[int, Tile]]:
        found = []
        for parts in PARTS:
            own = min(widths * int(fields["n"]) // parts, int(fields["n"]))
            tiles = [*COLUMNS, *((m, own, warps, 1) for m, warps in ((64, 4), (128, 8)) if own <= WIDEST_BLOCK)]
            found += [(parts, (m, n, w, stages) if n < own else (m, own, w, 1)) for m, n, w, stages in tiles]
        return [(parts, tile) for parts, tile in found if tile[1] >= NARROWEST_PART]

    return columns


def _gated_output_columns(fields: Fields) -> list[tuple[int, Tile]]:
    """Blocks of what is summed over, which every part reads as a whole: many narrow parts would read too much."""
    return [(parts, tile) for parts in PARTS if int(fields["n"]) // parts >= 2 * NARROWEST_PART for tile in COLUMNS]


def _input_gradient_columns(fields: Fields) -> list[tuple[int, Tile]]:
    """Blocks of what is summed over, and parts of the channels of x; lower tiles would read the weight too often."""
    return [(parts, tile) for parts in (2, 4) if int(fields["c"]) // parts >= 32 for tile in INPUT_GRADIENT_COLUMNS]


def _transition_update(fields: Fields) -> list[Config]:
    return [{"PARTS": parts, **tile_config(tile)} for parts in (2, 4) for tile in COLUMNS]


def _transition_backward(fields: Fields) -> list[Config]:
    by_library: list[Config] = [{"LIBRARY": 1, **tile_config(tile)} for tile in TRANSITION_BY_LIBRARY]
    return by_library + [tile_config(tile) for tile in TRANSITION_FUSED]


def _weight_gradient(fields: Fields) -> list[Config]:
    kernels: list[Config] = [{"LIBRARY": 0, **tile_config(tile)} for tile in WEIGHT_GRADIENT]
    copied: list[Config] = [{"LIBRARY": 0, "COPY_ENGINE": 1, **tile_config(tile)} for tile in WEIGHT_GRADIENT_COPIED]
    libraries: list[Config] = [{"LIBRARY": splits} for splits in (1, 8, 16, 32, 64, 128, 256)]
    return kernels if int(fields["n"]) < NARROWEST else libraries + kernels + copied


def _layer_norm(fields: Fields) -> list[Config]:
    return [{"BLOCK_M": rows, "num_warps": warps} for rows in (8, 16, 32, 64) for warps in (4, 8)]


def _attention(block_q: int, block_k: int, num_warps: int, stages: int, **extra: int) -> Config:
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": num_warps, "STAGES": stages, **extra}


def _attention_forward(fields: Fields) -> list[Config]:
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8), (128, 64, 4)]
    tiled = [_attention(*tile, stages, ROWS=1, UNROLLED=0) for tile in tiles for stages in (2, 3)]
    if int(fields["n"]) > 256:
        return tiled
    walked = [(stages, rows) for stages in (1, 2) for rows in (2, 4, 8, 16)]
    unrolled = [_attention(*tile, stages, ROWS=rows, UNROLLED=256) for tile in tiles for stages, rows in walked]
    denser = [
        _attention(64, block_k, 4, stages, ROWS=rows, UNROLLED=256, maxnreg=168)
        for block_k in (32, 64)
        for stages, rows in walked
    ]
    return tiled + unrolled + denser


def _attention_backward(fields: Fields) -> list[Config]:
    return [_attention(q, k, w, s) for q in (256, 128) for k in (32, 64, 128) for w in (4, 8) for s in (1, 2)]


def _attention_keys(fields: Fields) -> list[Config]:
    tiles = [(64, 64, 4, None), (64, 64, 4, 168), (64, 64, 4, 128), (32, 64, 4, 128), (32, 64, 4, None)]
    tiles += [(64, 128, 8, None), (64, 128, 8, 128), (32, 128, 8, 128), (32, 128, 4, 168)]
    return [
        _attention(block_q, block_k, warps, stages, **({} if limit is None else {"maxnreg": limit}))
        for block_q, block_k, warps, limit in tiles
        for stages in (1, 2)
    ]


def _attention_queries(fields: Fields) -> list[Config]:
    tiles = [(64, 256, 8), (32, 256, 8), (32, 256, 4), (16, 256, 4)]
    return [_attention(*tile, s, GROUPS=g) for tile in tiles for s in (2, 3, 4) for g in (8, 16)]


def _hopper_forward(fields: Fields) -> list[Config]:
    """HOPPER = 0: the Triton program. With a bias of 256 keys shared memory holds two stages."""
    present = forward_default(fields, 90)
    stages = (2,) if fields["bias"] else (4, 3)
    return [present | {"HOPPER": 0}] + [present | {"HOPPER": 1, "STAGES": n} for n in stages]


def _hopper_keys(fields: Fields) -> list[Config]:
    """HOPPER = 0: the Triton program."""
    present = keys_default(fields, 90)
    return [present | {"HOPPER": hopper} for hopper in (0, 1)]


def _hopper_rows(fields: Fields) -> list[Config]:
    """The Triton program and the one in Gluon."""
    return [rows_default(fields, 90) | {"HOPPER": hopper} for hopper in (0, 1)]


def _row_programs(fields: Fields) -> list[Config]:
    """The Triton program and the one in Gluon."""
    return [{"HOPPER": 0}, {"HOPPER": 1}]


def _global_columns(fields: Fields) -> list[Config]:
    return [
        {"BLOCK_S": block, "SEQUENCES": sequences, "num_warps": warps, "num_stages": stages}
        for block, warps in ((4, 4), (8, 4), (8, 8))
        for sequences in (16, 32, 64, 128)
        for stages in (1, 2, 3)
    ]


def _global_attend(fields: Fields) -> list[Config]:
    return [
        {"BLOCK_S": block, "num_warps": warps, "num_stages": stages}
        for block, warps in ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8))
        for stages in (1, 2)
    ]


def _global_gate(fields: Fields) -> list[Config]:
    return [{"BLOCK": block, "num_warps": warps, "num_stages": 1} for block in (64, 128, 256) for warps in (4, 8)]


def _global_rows(fields: Fields) -> list[Config]:
    return [
        {"BLOCK": block, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
        for block, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
        for programs in (132, 264, 396, 528)
        for stages in (1, 2)
    ]


def _point_attention(fields: Fields) -> list[Config]:
    blocks = [tile // int(fields["n"]) for tile in (1024, 2048, 4096, 8192)]
    return [{"BLOCK": block, "num_warps": warps} for block in blocks if 1 <= block <= 32 for warps in (2, 4, 8)]


def _point_errors(fields: Fields) -> list[Config]:
    tiles = ((8, 64), (8, 128), (16, 64), (16, 32), (32, 16), (64, 8))
    return [{"BLOCK_F": frames, "BLOCK_P": points, "num_warps": 4} for frames, points in tiles]


CANDIDATES: dict[str, Callable[[Fields], list[Config]]] = {
    "attention_backward": _attention_backward,
    "attention_backward_keys": _attention_keys,
    "attention_backward_queries": _attention_queries,
    "attention_forward": _attention_forward,
    "attention_hopper_forward": _hopper_forward,
    "attention_hopper_keys": _hopper_keys,
    "attention_hopper_rows": _hopper_rows,
    "gated_output_backward": _tiles(GATED_OUTPUT),
    "gated_output_columns": _parts(_gated_output_columns),
    "gated_output_forward": _tiles(GATED_OUTPUT),
    "gated_output_hopper": _row_programs,
    "gated_output_hopper_gradient": _row_programs,
    "global_attention_attend": _global_attend,
    "global_attention_attend_backward": _global_attend,
    "global_attention_columns": _global_columns,
    "global_attention_columns_backward": _global_columns,
    "global_attention_gate": _global_gate,
    "global_attention_rows_backward": _global_rows,
    "layer_norm_backward": _layer_norm,
    "layer_norm_forward": _layer_norm,
    "norm_linear_backward": _tiles(NORM_LINEAR_BACKWARD),
    "norm_linear_backward_columns": _parts(_input_gradient_columns),
    "norm_linear_columns": _parts(_own_columns(1)),
    "norm_linear_forward": _tiles(NORM_LINEAR_FORWARD),
    "norm_linear_hopper": _row_programs,
    "norm_linear_hopper_wide": _row_programs,
    "outer_product_backward": _tiles(OUTER_PRODUCT),
    "outer_product_forward": _tiles(OUTER_PRODUCT),
    "outer_product_hopper": _row_programs,
    "outer_product_hopper_operands": _row_programs,
    "outer_product_hopper_weight": _row_programs,
    "outer_product_weight": _tiles(OUTER_PRODUCT),
    "point_attention_columns": _point_attention,
    "point_attention_forward": _point_attention,
    "point_attention_rows": _point_attention,
    "point_errors_frames": _point_errors,
    "point_errors_points": _point_errors,
    "transition_backward": _transition_backward,
    "transition_columns": _parts(_own_columns(1)),
    "transition_forward": _tiles(TRANSITION_FORWARD),
    "transition_hopper": _row_programs,
    "transition_hopper_gradient": _row_programs,
    "transition_hopper_hidden": _row_programs,
    "transition_hopper_input": _row_programs,
    "transition_hopper_weights": _row_programs,
    "transition_update": _transition_update,
    "transition_weights": _tiles(RECOMPUTED_WEIGHTS),
    "triangle_hopper_gates": _row_programs,
    "triangle_hopper_operands": _row_programs,
    "triangle_hopper_output": _row_programs,
    "triangle_hopper_product": _row_programs,
    "triangle_hopper_product_gradients": _row_programs,
    "triangle_output_backward": _tiles(TRIANGLE),
    "triangle_output_forward": _tiles(TRIANGLE),
    "triangle_project_backward": _tiles(TRIANGLE),
    "triangle_project_columns": _parts(_own_columns(2)),
    "triangle_project_forward": _tiles(TRIANGLE),
    "triangle_project_weights": _tiles(RECOMPUTED_WEIGHTS),
    "weight_gradient": _weight_gradient,
    "weight_gradient_hopper": _row_programs,
}


REGISTERS = (96, 128, 168)  # per thread: five, four and three programs of four warps on a multiprocessor
FORMS = ("LIBRARY", "COPY_ENGINE", "HOPPER", "UNROLLED")  # say which program runs, not how it is cut
LADDERS = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "BLOCK_Q": (16, 32, 64, 128),
    "num_stages": (1, 2, 3, 4),
    "STAGES": (1, 2, 3, 4),
    "num_warps": (4, 8),
}


def space(name: str, fields: Fields) -> list[Config]:
    """Every combination of the values that a form of the kernel's program takes, its listed ones first.

    Parts of columns are listed in full: each has the tiles that fit it.
    """
    listed = CANDIDATES[name](fields)
    forms: dict[tuple[tuple[str, ...], ...], list[Config]] = {}
    for config in listed:
        forms.setdefault(_form(config), []).append(config)
    found = list(listed)
    for members in forms.values():
        found += [] if "PARTS" in members[0] else _grid(members)
    return [dict(items) for items in dict.fromkeys(tuple(sorted(c.items())) for c in found if not _stands_still(c))]


def _stands_still(config: Config) -> bool:
    """Whether a GPU would never end it: with one slot a Gluon program waits for a row that nobody may fetch."""
    return bool(config.get("HOPPER")) and config.get("STAGES", 2) < 2


def _form(config: Config) -> tuple[tuple[str, ...], ...]:
    names = tuple(sorted(config.keys() - {"maxnreg"}))
    return (names, tuple(f"{form}={config[form]}" for form in FORMS if form in config))


def _grid(members: list[Config]) -> list[Config]:
    """All combinations of the members' values; where a parameter varies it takes all of its ladder."""
    values = {name: {member[name] for member in members} for name in members[0] if name != "maxnreg"}
    ladders = [sorted(found | set(LADDERS.get(name, ()) if len(found) > 1 else ())) for name, found in values.items()]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*ladders)]


def neighbours(config: Config) -> list[Config]:
    """One parameter a step up or down, tile and warps together, or the registers of a thread limited."""
    if config.get("HOPPER") == 0 or config.get("PARTS") == 1:  # a program whose launch parameters are another kernel's
        return []
    found: list[Config] = []
    for name, value in config.items():
        if name in ("num_stages", "STAGES"):
            found += [config | {name: n} for n in (value - 1, value + 1) if 1 <= n <= 5]
        elif name.startswith("BLOCK") or name in ("num_warps", "ROWS", "GROUPS", "SEQUENCES", "PROGRAMS", "PARTS"):
            found += [config | {name: n} for n in (value // 2, value * 2) if n]
        elif name == "LIBRARY" and value > 1:  # into how many ranges a weight gradient's rows are split
            found += [config | {name: n} for n in (value // 2, value * 2)]
    rows = next((name for name in ("BLOCK_M", "BLOCK_Q") if name in config), None)
    if rows is not None and "num_warps" in config:  # a Gluon program has its own number
        found += [config | {"maxnreg": n} for n in REGISTERS]
        found += [config | {rows: config[rows] // 2, "num_warps": config["num_warps"] // 2}]
        found += [config | {rows: config[rows] * 2, "num_warps": config["num_warps"] * 2}]
    return [c for c in found if 1 <= c.get("num_warps", 1) <= 16 and not _stands_still(c)]
