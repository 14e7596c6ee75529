"""Attention with a bias at shapes worth a Gluon program: inputs, exact results, both forms of the keys' gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import attention as hopper
from scalefold.kernels.ops import attention as twin
from tune_candidates import CANDIDATES

INF = 1e9
KERNEL = "attention_hopper_keys"
ALLOWED = 1.2  # times the twin's own error
SLACK = 1e-6  # what rounding in another order may add to a result that is nearly exact


@dataclass(frozen=True)
class Case:
    """q of shape [B, S, N, H, D]; transposed: stored with S and N exchanged; masked: a third of all keys, the last row
    of each entry entirely; thorough: worth all launch parameters.
    """

    name: str
    shape: tuple[int, int, int, int, int]
    transposed: bool = False
    masked: bool = False
    thorough: bool = False


CASES = (
    Case("triangle_start", (1, 256, 256, 4, 32), thorough=True),
    Case("triangle_end", (1, 256, 256, 4, 32), transposed=True),
    Case("triangle_masked", (1, 256, 256, 4, 32), masked=True),
    Case("triangle_dap2", (1, 128, 256, 4, 32)),
    Case("msa_row", (1, 128, 256, 8, 32), thorough=True),
    Case("msa_row_124", (1, 124, 256, 8, 32), masked=True),
    Case("msa_row_dap2", (1, 64, 256, 8, 32)),
    Case("awkward", (2, 5, 201, 4, 32), masked=True),
    Case("template", (4, 256, 256, 4, 16)),
    Case("extra_msa_row", (1, 1024, 256, 8, 8)),
)


class Inputs(NamedTuple):
    """Inputs of an attention and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    bias: Tensor
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
    return Inputs(q, k, v, mask, draw(batch, heads, n, n), do)


def exact_results(inputs: Inputs) -> Results:
    """dk, dv and ds in fp32, entry by entry and in groups of rows, which bounds the memory."""
    entries = [_exact_entry(inputs, b) for b in range(inputs.q.shape[0])]
    return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}


def _exact_entry(inputs: Inputs, b: int) -> Results:
    rows = (inputs.q, inputs.k, inputs.v, inputs.do, inputs.mask)
    bias = inputs.bias[b : b + 1].float()
    parts = [
        _exact_rows(*(x[b : b + 1, s : s + 32].float() for x in rows), bias=bias)
        for s in range(0, rows[0].shape[1], 32)
    ]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor, *, bias: Tensor) -> Results:
    scale = q.shape[-1] ** -0.5
    logits = torch.einsum("bsqhd,bskhd->bshqk", q * scale, k) + (mask - 1.0)[:, :, None, None, :] * INF
    weights = (logits + bias[:, None]).softmax(-1)
    o = torch.einsum("bshqk,bskhd->bsqhd", weights, v)
    delta = (o * do).sum(-1).transpose(2, 3)[..., None]
    ds = weights * (torch.einsum("bsqhd,bskhd->bshqk", do, v) - delta)
    return {
        "dk": torch.einsum("bshqk,bsqhd->bskhd", ds, q) * scale,
        "dv": torch.einsum("bshqk,bsqhd->bskhd", weights, do),
        "ds": ds.transpose(-1, -2),
    }


Implementation = Callable[..., tuple[Tensor, Tensor, Tensor]]
TWIN: Implementation = twin._key_gradients
HOPPER: Implementation = hopper.key_gradients


class Saved(NamedTuple):
    """What the forward keeps for the backward."""

    o: Tensor
    lse: Tensor
    rest: Tensor


def saved_results(inputs: Inputs) -> Saved:
    """Output and statistics of the forward."""
    q, k, v, mask, bias, _ = inputs
    o, lse, rest = twin._forward(q, k, v, mask, bias, INF, True)
    assert lse is not None
    assert rest is not None
    return Saved(o, lse, rest)


def run(how: Implementation, inputs: Inputs, saved: Saved) -> Results:
    """dk, dv and ds by one implementation."""
    q, k, v, mask, bias, do = inputs
    found = how(q, k, v, mask, bias, saved.o, do, saved.lse, saved.rest, INF)
    return dict(zip(("dk", "dv", "ds"), found, strict=True))


def errors(found: Results, exact: Results) -> dict[str, float]:
    """Relative errors by name."""
    return {name: float((value.float() - exact[name]).norm() / exact[name].norm()) for name, value in found.items()}


def too_large(own: dict[str, float], other: dict[str, float]) -> list[str]:
    """Results whose error exceeds ALLOWED times the twin's, or is no number."""
    return [name for name, error in own.items() if not error <= ALLOWED * other[name] + SLACK]


def configurations(case: Case) -> list[tuning.Config]:
    """Launch parameters worth a try: all of a thorough case, else the first."""
    fields = tuning.attention_fields(inputs_of(case, "meta").q, True)
    found = [config for config in CANDIDATES[KERNEL](fields) if config["HOPPER"]]
    return found if case.thorough else found[:1]
