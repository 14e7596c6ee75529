"""Row-wise Gluon programs beside their Triton twins and the plain definition in fp32, at the shapes of training.

A case builds its inputs once and offers the same result three ways. Results are lists of tensors; partial sums are
summed up, because the two split them differently.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from operation_cases import Draw, Rows
from scalefold.kernels import tuning
from scalefold.kernels.hopper import pairs, projections
from scalefold.kernels.ops import gated_output, linear, triangle
from scalefold.kernels.rows import chosen_tiles, common_rows, row_limit

Results = list[Tensor]
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Ways:
    """Three ways to one result; ``obstacle``: why the Gluon program cannot take it, or None."""

    obstacle: str | None
    gluon: Callable[[], Results]
    twin: Callable[[], Results]
    exact: Callable[[], Results]


@dataclass(frozen=True)
class HopperCase:
    """One program at one shape; ``kernel``: its name in the tables of launch parameters.

    Cases with the same ``program`` run the same machine code.
    """

    kernel: str
    program: str
    name: str
    build: Callable[[], Ways]

    def configs(self) -> list[tuning.Config]:
        """Launch parameters worth timing, all of the Gluon program."""
        own = tuning._tunables[self.kernel]
        found = [own.default({}, 90), *own.candidates({})]
        return [config for config in found if config["USED"]]


def layer_norm(x: Tensor, norm: Sequence[Tensor]) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], norm[0].float(), norm[1].float(), LAYER_NORM_EPS)


def summed(dx: Tensor, normed: Tensor, partials: Tensor) -> Results:
    """Results of an input gradient with its partial sums added up."""
    return [dx, normed, partials.double().sum(0)]


def forward(rows: Rows, c: int, heads: int, transposed: bool) -> Ways:
    """Norm and four projections, the last with a bias, and a narrow one (heads > 0)."""
    draw = Draw(False, torch.bfloat16)
    x, norm = draw(*rows, c, transposed=transposed), draw.norm(c)
    weights = [draw.weight(c, c) for _ in range(4)] + ([draw.weight(heads, c)] if heads else [])
    biases = [None, None, None, draw(c)] + ([None] if heads else [])

    def exact() -> Results:
        normed = layer_norm(x, norm)
        return [F.linear(normed, w.float(), None if b is None else b.float()) for w, b in zip(weights, biases)]  # noqa: B905

    return Ways(
        projections.projections_obstacle(x, None, weights),
        lambda: list(projections.projections(x, *norm, 4, weights, biases)),
        lambda: list(linear._forward(x, *norm, None, 4, weights, biases)),
        exact,
    )


def backward(rows: Rows, c: int, count: int, heads: int, transposed: bool, through: bool, columns: bool) -> Ways:
    """Input gradient of ``count`` projections; columns: x lies channels first, as the product of a triangle does."""
    draw = Draw(False, torch.bfloat16)
    if columns:
        x = draw(rows[0], c, *rows[1:]).permute(0, 2, 3, 1)
    else:
        x = draw(*rows, c, transposed=transposed)
    norm, weights = draw.norm(c), [draw.weight(c, c) for _ in range(count)]
    ds = [draw(*rows, c, transposed=transposed) for _ in range(count)]
    if count == 1:  # half of what the gates' kernel stores
        ds = [draw(*rows, 2 * c).chunk(2, -1)[1]]
    if heads:
        weights.append(draw.weight(heads, c))
        shape = (rows[0], heads, *rows[1:])
        ds.append(draw(*shape).movedim(1, -1))
        if transposed:
            ds[-1] = linear._in_rows_of(x, ds[-1])
    has_bias = [False] * (count - 1) + [True] + [False] * bool(heads)
    residual = draw(*rows, c, transposed=transposed) if through else None

    def exact() -> Results:
        normed = layer_norm(x, norm)
        d = sum(g.float() @ w.float() for g, w in zip(ds, weights, strict=True))
        hat = F.layer_norm(x.float(), (c,), None, None, LAYER_NORM_EPS)
        rstd = torch.rsqrt(x.float().var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS)
        scaled = d * norm[0].float()
        dx = (scaled - scaled.mean(-1, keepdim=True) - hat * (scaled * hat).mean(-1, keepdim=True)) * rstd
        sums = [(d.double() * hat.double()), d.double(), ds[count - 1].double()]
        return [dx + (residual.float() if through else 0), normed, torch.cat([s.flatten(0, -2).sum(0) for s in sums])]

    arguments = (weights, ds, has_bias, residual)
    return Ways(
        projections.input_gradient_obstacle(x, None, *arguments),
        lambda: summed(*projections.input_gradient(x, *norm, *arguments)),
        lambda: summed(*linear.input_gradient(x, *norm, None, *arguments)),
        exact,
    )


def operands(rows: Rows, c: int) -> Ways:
    draw = Draw(False, torch.bfloat16)
    z, norm, mask = draw(*rows, c), draw.norm(c), (draw(*rows) > -1).bfloat16()
    weights, biases = tuple(draw.weight(c, c) for _ in range(4)), tuple(draw(c) for _ in range(4))

    def exact() -> Results:
        normed = layer_norm(z, norm)
        made = [F.linear(normed, w.float(), b.float()) for w, b in zip(weights, biases, strict=True)]
        gated = [value * gate.sigmoid() * mask.float()[..., None] for value, gate in (made[:2], made[2:])]
        return [g.permute(0, 3, 1, 2) for g in gated]

    pairs_of = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
    return Ways(
        pairs.operands_obstacle(z, weights),
        lambda: list(pairs.operands(z, mask, *norm, weights, biases)),
        lambda: list(triangle.triangle_project(z, mask, *norm, *pairs_of)[1:]),
        exact,
    )


def output_inputs(rows: Rows, c: int, dropped: bool) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    draw = Draw(False, torch.bfloat16)
    z, x = draw(*rows, c), draw(rows[0], c, *rows[1:])
    parameters = [*draw.norm(c), *draw.norm(c), draw.weight(c, c), draw(c), draw.weight(c, c), draw(c)]
    return z, x, parameters, draw.dropout(rows[0], 1, rows[2], c) if dropped else None


def exact_gate_and_value(z: Tensor, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    weight_z, bias_z, weight_g, bias_g = (p.float() for p in parameters[4:])
    gate = F.linear(layer_norm(z, parameters[:2]), weight_g, bias_g).sigmoid()
    return gate, F.linear(layer_norm(x.permute(0, 2, 3, 1), parameters[2:4]), weight_z, bias_z)


def output(rows: Rows, c: int, dropped: bool) -> Ways:
    z, x, parameters, dropout = output_inputs(rows, c, dropped)

    def exact() -> Results:
        gate, value = exact_gate_and_value(z, x, parameters)
        return [z.float() + gate * value * (1.0 if dropout is None else dropout)]

    return Ways(
        pairs.output_obstacle(z, x, [parameters[4], parameters[6]], dropout),
        lambda: [pairs.triangle_output(z, x, parameters, dropout)],
        lambda: [triangle.triangle_output(z, x, *parameters, dropout)],
        exact,
    )


def gates(rows: Rows, c: int, dropped: bool) -> Ways:
    z, x, parameters, dropout = output_inputs(rows, c, dropped)
    d_out = Draw(False, torch.bfloat16)(*rows, c)

    def exact() -> Results:
        gate, value = exact_gate_and_value(z, x, parameters)
        d = d_out.float() * gate * (1.0 if dropout is None else dropout)
        return [torch.cat([d, d * value * (1 - gate)], -1)]

    return Ways(
        pairs.gates_obstacle(z, x, [parameters[4], parameters[6]], dropout, d_out),
        lambda: [pairs.output_gates(z, x, parameters, dropout, d_out)],
        lambda: [gates_twin(z, x, parameters, dropout, d_out)],
        exact,
    )


def gates_twin(z: Tensor, x: Tensor, parameters: list[Tensor], dropout: Tensor | None, d_out: Tensor) -> Tensor:
    """The launch in ``triangle``'s backward of its output."""
    c, x = z.shape[-1], x.permute(0, 2, 3, 1)
    config = chosen_tiles("triangle_output_backward", z, c, c)
    projected = z.new_empty(*z.shape[:-1], 2 * c)
    dims, count, strides = common_rows(z, x, z if dropout is None else dropout, d_out, projected)
    triangle._output_gradient_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
        z, strides[0], x, strides[1], *parameters, dropout, strides[2], d_out, strides[3], projected, strides[4], dims,
        row_limit(count, config), C=c, CX=c, **config,
    )  # fmt: skip
    return projected


def gated(rows: Rows, c: int, transposed: bool) -> Ways:
    draw = Draw(False, torch.bfloat16)
    x, o, gate = (draw(*rows, c, transposed=transposed) for _ in range(3))
    weight, bias, dropout = draw.weight(c, c), draw(c), draw.dropout(rows[0], 1, rows[2], c)

    def exact() -> Results:
        update = F.linear(o.float() * gate.float().sigmoid(), weight.float(), bias.float())
        return [x.float() + update * dropout]

    return Ways(
        pairs.gated_obstacle(x, o, gate, weight, dropout),
        lambda: [pairs.gated_output(x, o, gate, weight, bias, dropout)],
        lambda: [gated_output.gated_output(x, o.unflatten(-1, (4, c // 4)), gate, weight, bias, dropout)],
        exact,
    )


def cases(rows: Rows, msa: Rows | None = None) -> list[HopperCase]:
    """Every program for a pair tensor of these rows, and the projections of an MSA of those."""
    size = "x".join(map(str, rows))
    found = []

    def add(kernel: str, what: str, build: Callable[[], Ways]) -> None:
        program = what.removesuffix(" starting").removesuffix(" ending").removesuffix(" row").removesuffix(" column")
        found.append(HopperCase(kernel, program, f"{what} {size}", build))

    for transposed in (False, True):
        node = "ending" if transposed else "starting"
        stored = (rows[0], rows[2], rows[1]) if transposed else rows
        add("hopper_projections", f"projections {node}", functools.partial(forward, stored, 128, 4, transposed))
        add(
            "hopper_input_gradient", f"gradient {node}",
            functools.partial(backward, stored, 128, 4, 4, transposed, True, False),
        )  # fmt: skip
        add("hopper_gated_output", f"gated {node}", functools.partial(gated, stored, 128, transposed))
    add("hopper_input_gradient", "gradient gate", functools.partial(backward, rows, 128, 1, 0, False, True, False))
    add("hopper_input_gradient", "gradient product", functools.partial(backward, rows, 128, 1, 0, False, False, True))
    add("hopper_triangle_operands", "operands", functools.partial(operands, rows, 128))
    add("hopper_triangle_output", "output", functools.partial(output, rows, 128, True))
    add("hopper_triangle_gates", "gates", functools.partial(gates, rows, 128, True))
    if msa:
        size = "x".join(map(str, msa))
        add("hopper_projections", "projections MSA row", functools.partial(forward, msa, 256, 0, False))
        add(
            "hopper_projections", "projections MSA column",
            functools.partial(forward, (msa[0], msa[2], msa[1]), 256, 0, True),
        )  # fmt: skip
    return found


def training_shares(dap: int) -> list[HopperCase]:
    """The programs at the share of a rank."""
    return cases((1, 256 // dap, 256), (1, 128 // dap, 256))
