"""Representative launches of the Gluon programs, on meta tensors (see ``tuning``); nothing for other capabilities."""

from collections.abc import Callable

import torch
from torch import Tensor

from scalefold.kernels import tuning
from scalefold.kernels.hopper import pairs, projections

C, PAIR, MSA = 128, (1, 256, 256), (1, 128, 256)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(count: int) -> list[Tensor]:
    return [_empty(C) for _ in range(2 * count)]


def _projections(rows: tuple[int, int, int], c: int, heads: int) -> None:
    weights = [_empty(c, c) for _ in range(4)] + [_empty(heads, c)] * bool(heads)
    biases = [None, None, None, _empty(c)] + [None] * bool(heads)
    projections.projections(_empty(*rows, c), _empty(c), _empty(c), 4, weights, biases)


def _input_gradient(count: int, heads: int, columns: bool) -> None:
    x = _empty(1, C, *PAIR[1:]).permute(0, 2, 3, 1) if columns else _empty(*PAIR, C)
    weights = [_empty(C, C) for _ in range(count)] + [_empty(heads, C)] * bool(heads)
    ds = [_empty(*PAIR, C) for _ in range(count)] + [_empty(1, heads, *PAIR[1:]).movedim(1, -1)] * bool(heads)
    has_bias = [False] * (count - 1) + [True] + [False] * bool(heads)
    projections.input_gradient(x, *_norms(1), weights, ds, has_bias, None if columns else _empty(*PAIR, C))


def _operands() -> None:
    weights, biases = [_empty(C, C) for _ in range(4)], [_empty(C) for _ in range(4)]
    pairs.operands(_empty(*PAIR, C), _empty(*PAIR), *_norms(1), weights, biases)


def _output(backward: bool) -> None:
    z, x, dropout = _empty(*PAIR, C), _empty(1, C, *PAIR[1:]), _empty(1, 1, 256, C, dtype=torch.float32)
    parameters = [*_norms(2), _empty(C, C), _empty(C), _empty(C, C), _empty(C)]
    if backward:
        pairs.output_gates(z, x, parameters, dropout, _empty(*PAIR, C))
    else:
        pairs.triangle_output(z, x, parameters, dropout)


def _gated() -> None:
    x, o, gate = (_empty(*PAIR, C) for _ in range(3))
    pairs.gated_output(x, o, gate, _empty(C, C), _empty(C), _empty(1, 1, 256, C, dtype=torch.float32))


CASES: list[tuple[str, Callable[[], None]]] = [
    ("hopper_project_pair", lambda: _projections(PAIR, C, 4)),
    ("hopper_project_msa", lambda: _projections(MSA, 256, 0)),
    ("hopper_gradient_pair", lambda: _input_gradient(4, 4, False)),
    ("hopper_gradient_gate", lambda: _input_gradient(1, 0, False)),
    ("hopper_gradient_product", lambda: _input_gradient(1, 0, True)),
    ("hopper_operands", _operands),
    ("hopper_output", lambda: _output(False)),
    ("hopper_output_gates", lambda: _output(True)),
    ("hopper_gated", _gated),
]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Every program of this folder; for other capabilities calls that launch nothing."""

    def only_here(call: Callable[[], None]) -> Callable[[], None]:
        return lambda: call() if tuning.capability() == 90 else None

    return [(name, only_here(call)) for name, call in CASES]
