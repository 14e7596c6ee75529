"""Attention at shapes worth a Gluon program: inputs, exact results, and both forms of the passes that have one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import attention as hopper
from scalefold.kernels.ops import attention as twin
from scalefold.tune.candidates import CANDIDATES

INF = 1e9
KERNELS = {pass_: f"attention_hopper_{pass_}" for pass_ in ("forward", "keys", "rows")}
ALLOWED = 1.2  # times the twin's own error
SLACK = 1e-6  # what rounding in another order may add to a result that is nearly exact


@dataclass(frozen=True)
class Case:
    """q of shape [B, S, N, H, D]; transposed: stored with S and N exchanged; masked: a third of all keys, the last row
    of each entry entirely; thorough: worth all launch parameters.
    """

    name: str
    shape: tuple[int, int, int, int, int]
    biased: bool = True
    transposed: bool = False
    masked: bool = False
    thorough: bool = False

    @property
    def passes(self) -> list[str]:
        """Those that have a Gluon program."""
        fits = {"forward": self.shape[2] == hopper.LENGTHS[self.biased], "keys": self.biased, "rows": not self.biased}
        return [pass_ for pass_ in KERNELS if fits[pass_]]


CASES = (
    Case("triangle_start", (1, 256, 256, 4, 32), thorough=True),
    Case("triangle_end", (1, 256, 256, 4, 32), transposed=True),
    Case("triangle_masked", (1, 256, 256, 4, 32), masked=True),
    Case("triangle_dap2", (1, 128, 256, 4, 32)),
    Case("msa_row", (1, 128, 256, 8, 32), thorough=True),
    Case("msa_row_124", (1, 124, 256, 8, 32), masked=True),
    Case("msa_row_dap2", (1, 64, 256, 8, 32)),
    Case("msa_column", (1, 256, 128, 8, 32), biased=False, transposed=True, thorough=True),
    Case("msa_column_dap2", (1, 128, 128, 8, 32), biased=False, transposed=True, masked=True),
    Case("msa_column_704", (1, 704, 128, 8, 32), biased=False, transposed=True),
    Case("awkward", (2, 5, 201, 4, 32), masked=True),
    Case("awkward_rows", (2, 5, 256, 4, 32), masked=True),
    Case("awkward_columns", (2, 37, 128, 8, 32), biased=False, transposed=True, masked=True),
    Case("short_columns", (2, 7, 100, 8, 32), biased=False, masked=True),
    Case("template", (4, 256, 256, 4, 16)),
    Case("extra_msa_row", (1, 1024, 256, 8, 8)),
)


class Inputs(NamedTuple):
    """Inputs of an attention and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    bias: Tensor | None
    do: Tensor


Results = dict[str, Tensor]


def inputs_of(case: Case, device: str) -> Inputs:
    """The same random values every time; no values on ``meta``."""
    batch, rows, n, heads, width = case.shape
    generator = None if device == "meta" else torch.Generator(device=device).manual_seed(sum(case.shape))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    def draw_rows() -> Tensor:
        return draw(batch, n, rows, heads, width).transpose(1, 2) if case.transposed else draw(*case.shape)

    q, k, v, do = (draw_rows() for _ in range(4))
    mask = torch.ones(batch, rows, n, device=device, dtype=torch.bfloat16)
    if case.masked and device != "meta":
        mask = (torch.rand(batch, rows, n, generator=generator, device=device) > 0.3).bfloat16()
        mask[:, -1] = 0.0
        mask[:, 0] = 1.0
    return Inputs(q, k, v, mask, draw(batch, heads, n, n) if case.biased else None, do)


def exact_results(inputs: Inputs) -> Results:
    """All results in fp32, entry by entry and in groups of rows, which bounds the memory."""
    entries = [_exact_entry(inputs, b) for b in range(inputs.q.shape[0])]
    return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}


def _exact_entry(inputs: Inputs, b: int) -> Results:
    rows = (inputs.q, inputs.k, inputs.v, inputs.do, inputs.mask)
    bias = None if inputs.bias is None else inputs.bias[b : b + 1].float()
    parts = [
        _exact_rows(*(x[b : b + 1, s : s + 32].float() for x in rows), bias=bias)
        for s in range(0, rows[0].shape[1], 32)
    ]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor, *, bias: Tensor | None) -> Results:
    scale = q.shape[-1] ** -0.5
    logits = torch.einsum("bsqhd,bskhd->bshqk", q * scale, k) + (mask - 1.0)[:, :, None, None, :] * INF
    logits = logits if bias is None else logits + bias[:, None]
    weights = logits.softmax(-1)
    o = torch.einsum("bshqk,bskhd->bsqhd", weights, v)
    delta = (o * do).sum(-1).transpose(2, 3)[..., None]
    ds = weights * (torch.einsum("bsqhd,bskhd->bshqk", do, v) - delta)
    kept = mask.any(-1)[:, :, None, None].expand(delta.shape[:-1])
    return {
        "o": o,
        "lse": torch.logsumexp(logits, -1) * math.log2(math.e),
        "rest": torch.where(kept, 1.0, 1.0 / mask.shape[-1]),
        "dq": torch.einsum("bshqk,bskhd->bsqhd", ds, k) * scale,
        "dk": torch.einsum("bshqk,bsqhd->bskhd", ds, q) * scale,
        "dv": torch.einsum("bshqk,bsqhd->bskhd", weights, do),
        "ds": ds.transpose(-1, -2),
    }


class Implementation(NamedTuple):
    """The passes of one implementation."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    keys: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rows: Callable[..., tuple[Tensor, Tensor, Tensor]]


TWIN = Implementation(twin._forward, twin._key_gradients, twin._gradients)
HOPPER = Implementation(hopper.forward, hopper.key_gradients, hopper.row_gradients)


def run_forward(how: Implementation, inputs: Inputs) -> Results:
    """Output and statistics, which the backward wants."""
    q, k, v, mask, bias, _ = inputs
    found = zip(("o", "lse", "rest"), how.forward(q, k, v, mask, bias, INF, True), strict=True)
    return {name: value for name, value in found if value is not None}


def run(pass_: str, how: Implementation, inputs: Inputs, saved: Results) -> Results:
    """One pass of one implementation; ``saved``: the results of a forward."""
    if pass_ == "forward":
        return run_forward(how, inputs)
    q, k, v, mask, bias, do = inputs
    if pass_ == "rows":
        found = how.rows(q, k, v, mask, saved["o"], do, saved["lse"], saved["rest"], INF)
        return dict(zip(("dq", "dk", "dv"), found, strict=True))
    found = how.keys(q, k, v, mask, bias, saved["o"], do, saved["lse"], saved["rest"], INF)
    return dict(zip(("dk", "dv", "ds"), found, strict=True))


def errors(found: Results, exact: Results, mask: Tensor) -> dict[str, float]:
    """Relative errors by name; those of ``lse`` in rows that keep a key: beside a masked row's others vanish."""
    kept = mask.any(-1)

    def error(name: str, value: Tensor, expected: Tensor) -> float:
        if name == "lse":
            value, expected = value[kept], expected[kept]
        return float((value.float() - expected).norm() / expected.norm())

    return {name: error(name, value, exact[name]) for name, value in found.items()}


def too_large(own: dict[str, float], other: dict[str, float]) -> list[str]:
    """Results whose error exceeds ALLOWED times the twin's, or is no number."""
    return [name for name, error in own.items() if not error <= ALLOWED * other[name] + SLACK]


def configurations(case: Case, pass_: str) -> list[tuning.Config]:
    """Launch parameters worth a try: all of a thorough case, else the first."""
    fields = tuning.attention_fields(inputs_of(case, "meta").q, case.biased)
    found = [config for config in CANDIDATES[KERNELS[pass_]](fields) if config["HOPPER"]]
    return found if case.thorough else found[:1]
