"""What every sub-layer of a step must take, was meant to take, and takes, from rows of ``benchmarks/results``.

``sub_layers.csv`` holds calls in a step with one pass, operations, bytes and lane operations of a sub-layer that reads
its inputs and writes its outputs once, and its budget on both cards; ``cards.csv`` what a card can do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, str]
Times = tuple[float, ...]  # µs of both directions; one number where they were measured, or run, as one
COUNTS = {"gflop": "bf16_tflops", "gb": "tb_per_second", "glanes": "lane_tops"}  # needed -> what a card can do
PAIR_BIAS = ("layer_norm_linear", "1x256x256x128to8")
OPERATIONS = {  # sub-layer -> operations and shapes in kernels.csv
    "MSA row attention": (
        ("layer_norm_linear", "1x128x256x256to256+256+256+256"),
        PAIR_BIAS,
        ("attention", "1x128x256x8h32_bias"),
        ("gated_output", "1x128x256x256from256"),
    ),
    "MSA column attention": (
        ("layer_norm_linear", "1x256x128tx256to256+256+256+256"),
        ("attention", "1x256x128tx8h32_plain"),
        ("gated_output", "1x256x128tx256from256"),
    ),
    "MSA transition": (("transition", "1x128x256x256by4"),),
    "outer product mean": (("outer_product_project", "1x128x256x256"), ("outer_product_update", "128x256x256")),
    "triangle multiplication, outgoing": (("triangle_multiplication", "1x256x256x128_outgoing"),),
    "triangle multiplication, incoming": (("triangle_multiplication", "1x256x256x128_incoming"),),
    "triangle attention, starting node": (
        ("layer_norm_linear", "1x256x256x128to128+128+128+128+4"),
        ("attention", "1x256x256x4h32_bias"),
        ("gated_output", "1x256x256x128from128"),
    ),
    "triangle attention, ending node": (
        ("layer_norm_linear", "1x256x256tx128to128+128+128+128+4"),
        ("attention", "1x256x256tx4h32_bias"),
        ("gated_output", "1x256x256tx128from128"),
    ),
    "pair transition": (("transition", "1x256x256x128by4"),),
    "extra MSA row attention": (
        ("layer_norm_linear", "1x1024x256x64to64+64+64+64"),
        PAIR_BIAS,
        ("attention", "1x1024x256x8h8_bias"),
        ("gated_output", "1x1024x256x64from64"),
    ),
    "extra MSA global column attention": (("global_attention", "1x1024x256x64"),),
    "extra MSA transition": (("transition", "1x1024x256x64by4"),),
    "extra MSA outer product mean": (
        ("outer_product_project", "1x1024x256x64"),
        ("outer_product_update", "1024x256x256"),
    ),
    "template triangle attention": (
        ("layer_norm_linear", "4x256x256x64to64+64+64+64+4"),
        ("attention", "4x256x256x4h16_bias"),
        ("gated_output", "4x256x256x64from64"),
    ),
    "template triangle multiplication": (
        ("triangle_project", "4x256x256x64"),
        ("triangle_product", "4x64x256x256"),
        ("triangle_output", "4x256x256x64"),
    ),
    "template pair transition": (("transition", "4x256x256x64by2"),),
}
PARTS = {  # sub-layer -> parts in small_kernels.csv
    "template embedding, attention over templates": ("templates",),
    "embedders": ("embedders",),
    "structure module": ("iterations", "read_out"),
    "heads and losses": ("heads", "losses"),
}
OPTIMIZER = "optimizer and averages"  # in dap_share.csv


@dataclass(frozen=True)
class Measured:
    """Times of what was measured of a sub-layer, the commits, and what of it was not."""

    us: Times
    commits: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer on one card; times in µs of one call."""

    name: str
    calls: int
    work: tuple[Row, ...]  # its rows of sub_layers.csv
    floor: Times
    budget: Times
    measured: Measured | None

    def step_ms(self, times: Times) -> float:
        """Milliseconds of a step with one pass."""
        return self.calls * sum(times) / 1000


def floor_us(work: Row, card: Row) -> float:
    """The longest of operations, bytes and lane operations at what the card can do, in µs."""
    return max(1000 * float(work[need]) / float(card[rate]) for need, rate in COUNTS.items())


def found(times: Mapping[str, tuple[Times, str]], names: Iterable[str]) -> Measured | None:
    """Sum over the names that have a time and a commit; None where none has."""
    names = list(names)
    known = [times[name] for name in names if name in times]
    if not known:
        return None
    us = tuple(map(sum, zip(*(own for own, _ in known), strict=True)))
    return Measured(us, tuple(dict.fromkeys(commit for _, commit in known)), tuple(n for n in names if n not in times))


def measured_names(name: str) -> Sequence[str]:
    """What a sub-layer consists of, as keys of measured times."""
    return [" ".join(own) for own in OPERATIONS.get(name, ())] or PARTS.get(name, (name,))


def sub_layers(rows: Sequence[Row], card: Row, times: Mapping[str, tuple[Times, str]]) -> list[SubLayer]:
    """All of them in the order of the rows; ``times``: µs and commit by operation and shape, part, or sub-layer."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["sub_layer"], []).append(row)
    budget = f"budget_{card['card'].lower()}_us"
    return [
        SubLayer(
            name,
            int(own[0]["calls"]),
            tuple(own),
            tuple(floor_us(row, card) for row in own),
            tuple(float(row[budget]) for row in own),
            found(times, measured_names(name)),
        )
        for name, own in by_name.items()
    ]
