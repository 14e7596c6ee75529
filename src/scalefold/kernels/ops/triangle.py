"""Triangle multiplication in Triton, forward and backward: project and output (Supplement Algorithms 11, 12).

Layer norms, gates, masks, dropout and the residual stay in registers; operands of the product are written channels
first by the projecting kernel, so nothing is ever transposed in memory. Saved for the backward: z, a, b and x. On
compute capability 9.0 programs of ``kernels.hopper`` take the place of these where they are faster.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.destination import Destination, OfOperands
from scalefold.kernels.gradients.input_gradient import input_gradient
from scalefold.kernels.gradients.weight_gradient import Product, projected_partials, weight_partials
from scalefold.kernels.hopper import rows as hopper
from scalefold.kernels.hopper.choice import chosen
from scalefold.kernels.instructions import complete, program, sigmoid, wait_for_predecessors
from scalefold.kernels.owners import store_tile_by_columns, store_tile_everywhere
from scalefold.kernels.rows import (
    Affine,
    Norm,
    dot,
    launch,
    launch_with_sums,
    layout_obstacle,
    load_normed,
    load_per_row,
    load_tile,
    norm_input_gradient,
    store_column_sums,
    store_tile,
    sum_all,
    width_obstacle,
)

for _name, _default in {
    "triangle_project_forward": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
    "triangle_project_backward": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
    "triangle_output_forward": {64: (64, 32, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)},
    "triangle_output_backward": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
}.items():
    tuning.register_tiles(_name, _default)
tuning.register_parts("triangle_project_columns")


@triton.jit
def _projected(normed, linear, n, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """normed W^T + b for the output channels n; returns [BLOCK_M, BLOCK_N] fp32 and the block of W [BLOCK_N, C]."""
    block = tl.load(linear.weight + n[:, None] * C + tl.arange(0, C)[None, :])
    acc = dot(normed, tl.trans(block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    return acc + tl.load(linear.bias + n).to(tl.float32)[None, :], block


@program
@triton.jit
def _project_forward_kernel(
    z, mask, norm, linears, outs_a, outs_b, extent,
    WIDTH: tl.constexpr, OWNED: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of pairs: norm once, then sigmoid(gate) * value * mask for a and b, stored along the pairs.

    Each of PARTS programs makes the norm again: of two the first has a and the second b, of more each a part of one.
    Views of an operand: OWNED channels of it each, or, if that is none, all.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed = load_normed(z, norm, rows, extent, C, IN_REGISTERS=True)
    keep = load_per_row(mask, rows, extent)
    outs = (outs_a, outs_b)
    shares: tl.constexpr = PARTS // 2 if PARTS > 2 else 1  # of one operand
    for side in tl.static_range(2):
        if PARTS == 1 or tl.program_id(1) // shares == side:
            for first in range(0, WIDTH // shares, BLOCK_N):
                if PARTS > 2:
                    first += tl.program_id(1) % shares * (WIDTH // shares)
                n = first + tl.arange(0, BLOCK_N)
                gate, _ = _projected(normed, linears[2 * side + 1], n, C, BLOCK_M, BLOCK_N)
                value, _ = _projected(normed, linears[2 * side], n, C, BLOCK_M, BLOCK_N)
                product = sigmoid(gate) * value * keep[:, None]
                if OWNED > 0:
                    store_tile_by_columns(outs[side], product, rows, n, extent, OWNED)
                else:
                    store_tile_everywhere(outs[side], product, rows, n, extent)


@program
@triton.jit
def _project_backward_kernel(
    z, mask, norm, linears, through, ds, projected, dz, normed_out, partials, extent,
    WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of pairs: values and gates again, their gradients [rows, 4 WIDTH] stored, then the norm's backward, plus the
    gradient of z that came ``through`` the output's residual connection (None: there was none). The norm is stored too.

    Without ``projected`` these gradients are not stored, nor their sums: ``projected_partials`` finds them itself.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed = load_normed(z, norm, rows, extent, C)
    keep = load_per_row(mask, rows, extent)
    own = partials + tl.program_id(0).to(tl.int64) * (2 * C)
    if projected is not None:
        own += tl.program_id(0).to(tl.int64) * (4 * WIDTH)
    c = tl.arange(0, C)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    for side in tl.static_range(2):
        for first in range(0, WIDTH, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            logits, gate_block = _projected(normed, linears[2 * side + 1], n, C, BLOCK_M, BLOCK_N)
            value, value_block = _projected(normed, linears[2 * side], n, C, BLOCK_M, BLOCK_N)
            gate = sigmoid(logits)
            d = load_tile(ds[side], rows, n, extent).to(tl.float32) * keep[:, None] * gate
            d_logits = d * value * (1.0 - gate)
            d_value, d_logits = d.to(normed.dtype), d_logits.to(normed.dtype)
            if projected is not None:
                store_column_sums(own + 2 * C + 2 * side * WIDTH, d_value, n, None)
                store_column_sums(own + 2 * C + (2 * side + 1) * WIDTH, d_logits, n, None)
                store_tile(projected, d_value, rows, 2 * side * WIDTH + n, extent)
                store_tile(projected, d_logits, rows, (2 * side + 1) * WIDTH + n, extent)
            acc = dot(d_value, value_block, acc)
            acc = complete(dot(d_logits, gate_block, acc))
    gradient, _ = norm_input_gradient(acc, z, norm, None, normed_out, own, rows, extent, C)
    if through is not None:
        gradient += load_tile(through, rows, c, extent).to(tl.float32)
    store_tile(dz, gradient, rows, c, extent)


@program
@triton.jit
def _output_forward_kernel(
    z, x, norm_in, norm_out, linear_z, linear_g, dropout, out, extent,
    C: tl.constexpr, CX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of pairs: both norms once, then gate * value, dropout and residual per block of channels."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed_z = load_normed(z, norm_in, rows, extent, C)
    normed_x = load_normed(x, norm_out, rows, extent, CX)
    for first in range(0, C, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        gate, _ = _projected(normed_z, linear_g, n, C, BLOCK_M, BLOCK_N)
        value, _ = _projected(normed_x, linear_z, n, CX, BLOCK_M, BLOCK_N)
        update = sigmoid(gate) * value
        if dropout is not None:
            update *= load_tile(dropout, rows, n, extent).to(tl.float32)
        update += load_tile(z, rows, n, extent).to(tl.float32)
        store_tile(out, update, rows, n, extent)


@program
@triton.jit
def _output_gradient_kernel(
    z, x, norm_in, norm_out, linear_z, linear_g, dropout, d_out, projected, extent,
    C: tl.constexpr, CX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile of pairs: value and gate again, and their gradients, stored as [rows, 2 C]."""
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    normed_z = load_normed(z, norm_in, rows, extent, C)
    normed_x = load_normed(x, norm_out, rows, extent, CX)
    for first in range(0, C, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        logits, _ = _projected(normed_z, linear_g, n, C, BLOCK_M, BLOCK_N)
        value, _ = _projected(normed_x, linear_z, n, CX, BLOCK_M, BLOCK_N)
        gate = sigmoid(logits)
        d = load_tile(d_out, rows, n, extent).to(tl.float32) * gate
        if dropout is not None:
            d *= load_tile(dropout, rows, n, extent).to(tl.float32)
        store_tile(projected, d, rows, n, extent)
        store_tile(projected, d * value * (1.0 - gate), rows, C + n, extent)


def _channels_last(x: Tensor) -> Tensor:
    """View of [B, c, I, J] as [B, I, J, c]."""
    return x.permute(0, 2, 3, 1)


class _Project(torch.autograd.Function):
    """Arguments: destinations, z, mask, norm weight, norm bias, four weights, four biases (a, a gate, b, b gate)."""

    @staticmethod
    def forward(ctx, destinations, z, mask, norm_weight, norm_bias, *parameters):
        weights, biases = parameters[:4], parameters[4:]
        ctx.save_for_backward(z, mask, norm_weight, norm_bias, *parameters)
        norm, linears = Norm(norm_weight, norm_bias), tuple(map(Affine, weights, biases))
        by_gluon = chosen("operands of a triangle's product", hopper.operands_obstacle(z, weights))
        if by_gluon and destinations[0] is not None:
            destinations = (None, None)  # Gluon writes a where it lies alone
        shape = (len(z), weights[0].shape[0], *z.shape[1:3])
        outs_a, outs_b = ([z.new_empty(shape)] if d is None else d.parts for d in destinations)
        if by_gluon:
            hopper.operands(z, mask, norm, linears, outs_a[0], outs_b)
        else:
            _project(z, mask, norm, linears, outs_a, outs_b)
        a, b = (_operand(d, outs, shape) for d, outs in zip(destinations, (outs_a, outs_b), strict=True))
        ctx.set_materialize_grads(False)  # without a residual connection z gets no gradient but the operands' own
        return z.view_as(z), a, b

    @staticmethod
    @once_differentiable
    def backward(ctx, through, *ds):
        z, mask, norm_weight, norm_bias, *parameters = ctx.saved_tensors
        weights, biases = tuple(parameters[:4]), tuple(parameters[4:])
        c, width, dtype = z.shape[-1], weights[0].shape[0], norm_weight.dtype
        config, linears = (
            tuning.chosen_tiles("triangle_project_backward", z, width, width),
            map(Affine, weights, biases),
        )
        linears, dz, normed = tuple(linears), torch.empty_like(z), torch.empty_like(z)
        ds = tuple(z.new_zeros(z.shape[0], width, *z.shape[1:3]) if d is None else d for d in ds)
        recomputed = bool(config.pop("RECOMPUTED", 0)) and _are_matrices(z, *ds)
        projected = None if recomputed else z.new_empty(*z.shape[:-1], 4 * width)
        inputs = {"z": z, "mask": mask[..., None], "ds": tuple(map(_channels_last, ds)), "through": through}
        outputs = {"projected": projected, "dz": dz, "normed_out": normed}
        partials = launch_with_sums(
            _project_backward_kernel, config, inputs | outputs, 2 * c + (0 if recomputed else 4 * width),
            norm=Norm(norm_weight, norm_bias), linears=linears, WIDTH=width, C=c,
        )  # fmt: skip

        def gradients() -> tuple[Tensor, ...]:
            if projected is None:
                norm, weight, bias = sum_all([partials, *projected_partials(normed, mask, linears, ds)], dtype)
            else:
                sums, weight = sum_all([partials, *weight_partials([Product(projected, normed)])], dtype)
                norm, bias = sums.split([2 * c, 4 * width])
            return *norm.chunk(2), *weight.view(4, width, c).unbind(0), *bias.chunk(4)

        given = [norm_weight, norm_bias, *weights, *biases]
        return None, dz, None, *aside.gradients(given, [partials, normed, projected, mask, *ds], gradients)


def _project(
    z: Tensor,
    mask: Tensor,
    norm: Norm,
    linears: Sequence[Affine],
    outs_a: Sequence[Tensor],
    outs_b: Sequence[Tensor],
) -> None:
    """``hopper.operands`` in Triton; outs of an operand: all of it each, or a part of its channels each."""
    assert linears[0].weight is not None
    width, own = len(linears[0].weight), outs_a[0].shape[1]
    names = "triangle_project_columns", "triangle_project_forward"
    config = tuning.chosen_parts(*names, z, width, width, columns=2 * width)
    tensors = {"z": z, "mask": mask[..., None]}
    tensors |= {name: tuple(map(_channels_last, outs)) for name, outs in (("outs_a", outs_a), ("outs_b", outs_b))}
    launch(
        _project_forward_kernel, config, tensors, norm=norm, linears=tuple(linears), WIDTH=width,
        OWNED=own if own < width else 0, C=z.shape[-1],
    )  # fmt: skip


def _operand(destination: Destination | None, outs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """What was written to ``outs``, or for a destination what stands for it."""
    if destination is None:
        return outs[0]
    destination.written = True
    return outs[0].new_empty(()).expand(shape)


def _are_matrices(z: Tensor, *ds: Tensor) -> bool:
    """Whether the copy engine reads pairs z: [1, I, J, c] and channels first [1, c, I, J] as matrices."""
    dense = all(x.shape[0] == 1 and hopper.is_dense(x) for x in (z, *ds))
    return dense and z.shape[1] * z.shape[2] % 8 == 0


class _Output(torch.autograd.Function):
    """Arguments: those of ``triangle_output``."""

    @staticmethod
    def forward(ctx, z, x, *rest):
        *parameters, dropout = rest
        ctx.save_for_backward(z, x, *rest)
        out, x, parameters = torch.empty_like(z), _channels_last(x), _output_parameters(*parameters)
        weights = parameters["linear_z"].weight, parameters["linear_g"].weight
        if chosen("output of a triangle", hopper.output_obstacle(z, x, weights, dropout)):
            hopper.output(z, x, dropout, None, out, **parameters)
        else:
            tensors = {"z": z, "x": x, "dropout": dropout, "out": out}
            _launch_output("triangle_output_forward", _output_forward_kernel, tensors, parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        z, x, *given, dropout = ctx.saved_tensors
        norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, weight_z, _, weight_g, _ = given
        c, cx, x = z.shape[-1], x.shape[1], _channels_last(x)
        projected, parameters = z.new_empty(*z.shape[:-1], 2 * c), _output_parameters(*given)
        obstacle = hopper.output_obstacle(z, x, (weight_z, weight_g), dropout, d_out)
        if chosen("gates of a triangle's output", obstacle):
            hopper.output(z, x, dropout, d_out, projected, **parameters)
        else:
            tensors = {"z": z, "x": x, "dropout": dropout, "d_out": d_out, "projected": projected}
            _launch_output("triangle_output_backward", _output_gradient_kernel, tensors, parameters)
        d_value, d_logits = projected.chunk(2, -1)
        norm_in, norm_out = (norm_in_weight, norm_in_bias, None), (norm_out_weight, norm_out_bias, None)
        dx, normed_x, x_sums = input_gradient(x, *norm_out, [weight_z], [d_value], [True], None)
        dz, normed_z, z_sums = input_gradient(z, *norm_in, [weight_g], [d_logits], [True], d_out)

        def gradients() -> tuple[Tensor, ...]:
            weight_sums = _output_weights(Product(d_value, normed_x), Product(d_logits, normed_z))
            sums = sum_all([*z_sums, *x_sums, *weight_sums], weight_z.dtype)
            d_norm_in, d_bias_g, d_norm_out, d_bias_z, d_weight_z, d_weight_g = sums
            d_norms = *d_norm_in.chunk(2), *d_norm_out.chunk(2)
            return *d_norms, d_weight_z.view(c, cx), d_bias_z, d_weight_g.view(c, c), d_bias_g

        read = [projected, normed_x, normed_z, *x_sums, *z_sums]
        return dz, dx.permute(0, 3, 1, 2), *aside.gradients(given, read, gradients), None


def _output_parameters(
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    weight_z: Tensor,
    bias_z: Tensor,
    weight_g: Tensor,
    bias_g: Tensor,
) -> dict[str, Norm | Affine]:
    """Parameters of ``triangle_output`` under their names in the programs."""
    norms = {"norm_in": Norm(norm_in_weight, norm_in_bias), "norm_out": Norm(norm_out_weight, norm_out_bias)}
    return norms | {"linear_z": Affine(weight_z, bias_z), "linear_g": Affine(weight_g, bias_g)}


def _launch_output(name: str, program: Any, tensors: dict[str, Tensor], parameters: dict[str, Norm | Affine]) -> None:
    """Run one of the output's programs, whose launch parameters have a name of their own."""
    c, cx = tensors["z"].shape[-1], tensors["x"].shape[-1]
    launch(program, tuning.chosen_tiles(name, tensors["z"], cx, c), tensors, **parameters, C=c, CX=cx)


def _output_weights(value: Product, gate: Product) -> list[Tensor]:
    """Partial gradients of the two linears: together if x and z are equally wide."""
    if value.a.shape[-1] == gate.a.shape[-1]:
        return weight_partials([value, gate])
    return [*weight_partials([value]), *weight_partials([gate])]


def project_obstacle(
    z: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_a: Tensor, *_: object
) -> str | None:
    """Why ``triangle_project`` does not take these arguments, or None."""
    return width_obstacle(z.shape[-1], weight_a.shape[0]) or layout_obstacle(z)


def triangle_project(
    z: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_a_gate: Tensor,
    bias_a_gate: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    weight_b_gate: Tensor,
    bias_b_gate: Tensor,
    destinations: OfOperands = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.triangle_project``: one kernel forward, two and library products backward."""
    weights = (weight_a, weight_a_gate, weight_b, weight_b_gate)
    biases = (bias_a, bias_a_gate, bias_b, bias_b_gate)
    return _Project.apply(destinations, z, mask, norm_weight, norm_bias, *weights, *biases)  # type: ignore[return-value]


def output_obstacle(z: Tensor, x: Tensor, *_: object) -> str | None:
    """Why ``triangle_output`` does not take these arguments, or None."""
    return width_obstacle(z.shape[-1], x.shape[1]) or layout_obstacle(z)


def triangle_output(
    z: Tensor,
    x: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    weight_z: Tensor,
    bias_z: Tensor,
    weight_g: Tensor,
    bias_g: Tensor,
    dropout: Tensor | None,
) -> Tensor:
    """``reference.triangle_output``: one kernel forward, three and library products backward."""
    parameters = (norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, weight_z, bias_z, weight_g, bias_g)
    return _Output.apply(z, x, *parameters, dropout)  # type: ignore[return-value]
