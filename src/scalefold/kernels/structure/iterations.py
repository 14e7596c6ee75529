"""Iterations of the structure module (Supplement Algorithm 20, lines 5 to 10), forward and backward, in one operation.

An iteration is a dozen launches forward and seventeen backward: products of the library, the kernels of
``ops.point_attention`` and the programs beside this file. What that saves over one operation after the other, besides
launches: weights are the same in all iterations, so their gradients are one product over the rows of all of them, and
the gradient of z grows in one buffer. Products that carry coordinates are full fp32 whatever the tf32 switch says, as
in ``ops.point_attention``; all others follow it.

Saved: of every iteration its state, frames, packed queries, keys and values, attention weights, features and the inputs
of all products.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.ops import point_attention as attention
from scalefold.kernels.rows import Affine, Norm, sum_all
from scalefold.kernels.structure import norms, points

WIDEST = 1024  # channels of s: a row stays in registers
ROWS = {"BLOCK_M": 2, "num_warps": 4}  # few rows per program: a crop has 256
RESIDUES = {"BLOCK_M": 4, "num_warps": 4}


class Sizes(NamedTuple):
    """Shape of the iterations."""

    iterations: int
    heads: int
    width: int  # channels of a query, key or value
    qk_points: int
    v_points: int

    @property
    def attended(self) -> int:
        """Channels and coordinates of a value."""
        return self.width + 3 * self.v_points

    @property
    def own_features(self) -> int:
        """Features of the output's projection before those of the pair representation."""
        return self.heads * (self.width + 4 * self.v_points)


class Weights(NamedTuple):
    """Parameters that all iterations share, [out, in] and [out]."""

    projection: Tensor  # of q, kv, q points, kv points together
    projection_bias: Tensor
    point_weights: Tensor  # [H]
    output: Tensor
    output_bias: Tensor
    norm_1: Tensor
    norm_1_bias: Tensor
    linear_1: Tensor
    linear_1_bias: Tensor
    linear_2: Tensor
    linear_2_bias: Tensor
    linear_3: Tensor
    linear_3_bias: Tensor
    norm_2: Tensor
    norm_2_bias: Tensor
    update: Tensor  # [6, c_s]
    update_bias: Tensor


class Kept(NamedTuple):
    """What iterations leave, first dimension: the iteration; one iteration's place serves all if nothing is kept."""

    states: Tensor  # [I + 1, rows, c_s]
    quaternions: Tensor  # [I + 1, rows, 4]
    translations: Tensor  # [I + 1, rows, 3]
    qk: Tensor  # [I, 2, B, H, D + 3 P_q, N]
    values: Tensor  # [I, B, N, H, D + 3 P_v]
    scores: Tensor  # [I, B, H, N, N], after the softmax
    features: Tensor  # [I, rows, F]
    before: Tensor  # [I, 2, rows, c_s], inputs of both layer norms
    hidden: Tensor  # [3, I, rows, c_s], inputs of the three linear layers
    moves: Tensor  # [I, rows, 6], outputs of the backbone update

    @staticmethod
    def empty(s: Tensor, z: Tensor, sizes: Sizes, every: bool) -> "Kept":
        """Room for all iterations, of their inner values for one unless ``every``."""
        (batch, n, c), heads = s.shape, sizes.heads
        rows, count, inner = batch * n, sizes.iterations, sizes.iterations if every else 1
        return Kept(
            s.new_empty(count + 1, rows, c),
            s.new_empty(count + 1, rows, 4),
            s.new_empty(count + 1, rows, 3),
            s.new_empty(inner, 2, batch, heads, sizes.width + 3 * sizes.qk_points, n),
            s.new_empty(inner, batch, n, heads, sizes.attended),
            s.new_empty(inner, batch, heads, n, n),
            s.new_empty(inner, rows, sizes.own_features + heads * z.shape[-1]),
            s.new_empty(inner, 2, rows, c),
            s.new_empty(3, inner, rows, c),
            s.new_empty(inner, rows, 6),
        )


def _point_sizes(sizes: Sizes) -> dict[str, int]:
    """Constants of the programs that place points."""
    heads, blocks = sizes.heads, tuning.power_of_two
    return {
        "H": heads,
        "D": sizes.width,
        "PQ": sizes.qk_points,
        "PV": sizes.v_points,
        "BLOCK_D": blocks(heads * sizes.width),
        "BLOCK_Q": blocks(heads * sizes.qk_points),
        "BLOCK_V": blocks(heads * (sizes.qk_points + sizes.v_points)),
        **RESIDUES,
    }


def _feature_sizes(sizes: Sizes) -> dict[str, int]:
    """Constants of the programs that turn results into features."""
    heads, blocks = sizes.heads, tuning.power_of_two
    width = {"BLOCK_D": blocks(heads * sizes.width), "BLOCK_P": blocks(heads * sizes.v_points)}
    return {"H": heads, "D": sizes.width, "PV": sizes.v_points, **width, **RESIDUES}


def _residue_grid(values: Tensor) -> tuple[int, int]:
    return tuning.ceil_div(values.shape[1], RESIDUES["BLOCK_M"]), values.shape[0]


def _row_grid(rows: Tensor) -> tuple[int]:
    return (tuning.ceil_div(rows.shape[0], ROWS["BLOCK_M"]),)


def _row_sizes(rows: Tensor) -> dict[str, int]:
    return {"C": rows.shape[1], "BLOCK_C": tuning.power_of_two(rows.shape[1]), **ROWS}


def _pair_features(features: Tensor, sizes: Sizes, batch: int) -> Tensor:
    """The last features [rows, F] as o_pair [B, N, H, c_z]."""
    own = features[:, sizes.own_features :].unflatten(-1, (sizes.heads, -1))
    return own.unflatten(0, (batch, -1))


def _attend(
    kept: Kept, i: int, z: Tensor, pair_bias: Tensor, mask: Tensor, w: Weights, sizes: Sizes, inf: float
) -> None:
    """Features of iteration i from its projections: point attention between this iteration's frames."""
    at = i % len(kept.scores)
    qk, values, scores, features = kept.qk[at], kept.values[at], kept.scores[at], kept.features[at]
    n, frames = values.shape[1], (kept.quaternions[i], kept.translations[i])
    projected = torch.addmm(w.projection_bias, kept.states[i], w.projection.t())
    points.place_kernel[_residue_grid(values)](projected, *frames, qk[0], qk[1], values, n, **_point_sizes(sizes))
    attention.attention_weights(qk, pair_bias, w.point_weights, mask, scores, sizes.width, inf)
    attended, pair = torch.empty_like(values), _pair_features(features, sizes, len(values))
    for scores_n, values_n, z_n, attended_n, pair_n in zip(scores, values, z, attended, pair, strict=True):
        with attention.full_fp32():
            torch.bmm(scores_n, values_n.transpose(0, 1), out=attended_n.transpose(0, 1))
        torch.bmm(scores_n.transpose(0, 1), z_n, out=pair_n)
    points.features_kernel[_residue_grid(values)](
        attended, *frames, features, n, features.shape[1], **_feature_sizes(sizes)
    )


def _move_on(kept: Kept, i: int, dropout: Tensor | None, w: Weights) -> None:
    """State and frames after iteration i, from its features."""
    at = i % len(kept.scores)
    features, before, hidden, moves = kept.features[at], kept.before[at], kept.hidden[:, at], kept.moves[at]
    after_attention, after_transition = (None, None) if dropout is None else dropout[i].flatten(1, 2)
    update = torch.addmm(w.output_bias, features, w.output.t())
    grid, sizes, num_rows = _row_grid(update), _row_sizes(update), len(update)
    norms.norm_kernel[grid](
        kept.states[i], update, after_attention, Norm(w.norm_1, w.norm_1_bias), None, None, None, before[0], hidden[0],
        None, None, None, num_rows, **sizes,
    )  # fmt: skip
    torch._addmm_activation(w.linear_1_bias, hidden[0], w.linear_1.t(), out=hidden[1])  # relu inside
    torch._addmm_activation(w.linear_2_bias, hidden[1], w.linear_2.t(), out=hidden[2])
    update = torch.addmm(w.linear_3_bias, hidden[2], w.linear_3.t())
    norms.norm_kernel[grid](
        hidden[0], update, after_transition, Norm(w.norm_2, w.norm_2_bias), Affine(w.update, w.update_bias),
        kept.quaternions[i], kept.translations[i], before[1], kept.states[i + 1], moves, kept.quaternions[i + 1],
        kept.translations[i + 1], num_rows, **sizes,
    )  # fmt: skip


class Flow(NamedTuple):
    """Gradients on their way back, first dimension as in ``Kept``; those of inputs that iterations share grow."""

    projected: Tensor  # [I, rows, columns of the projections]
    bias: Tensor  # [I, B, H, N, N]
    attended: Tensor  # [I, rows, c_s], gradient of s and of the attention's update
    transition: Tensor  # [3, I, rows, c_s], gradients of the outputs of the three linear layers
    moves: Tensor  # [I, rows, 6]
    sums: Tensor  # [2, I, tiles, 2 c_s], for both layer norms
    point_sums: Tensor  # [I, programs, H]
    z: Tensor  # [B, N, N, c_z]
    translation: Tensor  # [rows, 3]

    @staticmethod
    def empty(kept: Kept, z: Tensor, w: Weights) -> "Flow":
        """Room for the gradients of what was kept of every iteration."""
        inner, rows, c = kept.before.shape[0], kept.before.shape[2], kept.before.shape[3]
        grid = attention.rows_grid(kept.scores[0])
        return Flow(
            z.new_empty(inner, rows, len(w.projection)),
            torch.empty_like(kept.scores),
            z.new_empty(inner, rows, c),
            z.new_empty(3, inner, rows, c),
            torch.empty_like(kept.moves),
            z.new_empty(2, inner, *_row_grid(kept.before[0, 0]), 2 * c),
            z.new_empty(inner, grid[2] * grid[1], grid[0]),
            torch.empty(z.shape, dtype=z.dtype, device=z.device),
            z.new_zeros(rows, 3),
        )


def _back_to_update(
    kept: Kept, flow: Flow, i: int, d_outputs: Sequence[Tensor], d_s: Tensor | None, dropout: Tensor | None, w: Weights
) -> Tensor:
    """Gradient of the features of iteration i; d_s: that of the state after it from the next one's projections."""
    beside = None if d_s is None else flow.attended[i + 1]  # what passes by the next iteration's attention
    d_states, d_quaternions, d_translations = (d[i] for d in d_outputs)
    after_attention, after_transition = (None, None) if dropout is None else dropout[i].flatten(1, 2)
    d, hidden, before = flow.transition[:, i], kept.hidden[:, i], kept.before[i]
    grid, sizes, num_rows = _row_grid(d_states), _row_sizes(d_states), len(d_states)
    norms.norm_backward_kernel[grid](
        before[1], d_states, d_s, beside, after_transition, Norm(w.norm_2, w.norm_2_bias),
        Affine(w.update, w.update_bias), kept.quaternions[i], kept.moves[i], d_quaternions, d_translations,
        flow.translation, flow.moves[i], d[2], flow.sums[1, i], num_rows, **sizes,
    )  # fmt: skip
    relu_backward = torch.ops.aten.threshold_backward.grad_input
    relu_backward(d[2] @ w.linear_3, hidden[2], 0, grad_input=d[1])
    relu_backward(d[1] @ w.linear_2, hidden[1], 0, grad_input=d[0])
    norms.norm_backward_kernel[grid](
        before[0], d[0] @ w.linear_1, d[2], None, after_attention, Norm(w.norm_1, w.norm_1_bias), None, None, None,
        None, None, None, None, flow.attended[i], flow.sums[0, i], num_rows, **sizes,
    )  # fmt: skip
    return flow.attended[i] @ w.output


def _back_to_state(kept: Kept, flow: Flow, i: int, d_features: Tensor, z: Tensor, w: Weights, sizes: Sizes) -> Tensor:
    """Gradient of the state before iteration i through its projections, from that of its features."""
    qk, values, scores, d_bias = kept.qk[i], kept.values[i], kept.scores[i], flow.bias[i]
    d_attended, d_values, d_qk = torch.empty_like(values), torch.empty_like(values), torch.empty_like(qk)
    n, quaternion, grid = values.shape[1], kept.quaternions[i], _residue_grid(values)
    points.features_backward_kernel[grid](
        d_features, kept.features[i], quaternion, flow.translation, d_attended, n, d_features.shape[1],
        **_feature_sizes(sizes),
    )  # fmt: skip
    d_pair = _pair_features(d_features, sizes, len(values))
    attention.weights_gradient(values, z, d_attended, d_pair, d_bias)
    for scores_n, d_attended_n, d_pair_n, d_values_n, d_z_n in zip(
        scores, d_attended, d_pair, d_values, flow.z, strict=True
    ):
        with attention.full_fp32():
            torch.bmm(scores_n.transpose(1, 2), d_attended_n.transpose(0, 1), out=d_values_n.transpose(0, 1))
        if i == len(kept.scores) - 1:  # the first to come
            torch.bmm(scores_n.permute(1, 2, 0), d_pair_n, out=d_z_n)
        else:
            d_z_n.baddbmm_(scores_n.permute(1, 2, 0), d_pair_n)
    attention.logits_gradient(qk, w.point_weights, scores, d_bias, d_qk, flow.point_sums[i], sizes.width)
    points.place_backward_kernel[grid](
        d_qk[0], d_qk[1], d_values, quaternion, flow.translation, flow.projected[i], n, **_point_sizes(sizes)
    )
    return flow.projected[i] @ w.projection


def _weight_gradients(kept: Kept, flow: Flow) -> list[Tensor]:
    """In the order of ``Weights``: sums over the rows of all iterations."""

    def linear(d: Tensor, x: Tensor) -> list[Tensor]:
        d, x = d.flatten(0, 1), x.flatten(0, 1)
        return [d.t() @ x, d.sum(0)]

    c = kept.states.shape[-1]
    norm_1, norm_2, point_weights = sum_all(
        [*flow.sums.flatten(1, 2), flow.point_sums.flatten(0, 1)], kept.states.dtype
    )
    layers = [linear(flow.transition[k], kept.hidden[k]) for k in range(3)]
    return [
        *linear(flow.projected, kept.states[:-1]),
        point_weights,
        *linear(flow.attended, kept.features),
        *norm_1.split(c),
        *(gradient for layer in layers for gradient in layer),
        *norm_2.split(c),
        *linear(flow.moves, kept.states[1:]),
    ]


class _Iterations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sizes, inf: float, every: bool, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, z, pair_bias, mask, dropout, *weights = tensors
        kept, w = Kept.empty(s, z, sizes, every), Weights(*weights)
        kept.states[0].copy_(s.flatten(0, 1))
        kept.translations[0].zero_()
        kept.quaternions[0].zero_()
        kept.quaternions[0, :, 0] = 1.0
        for i in range(sizes.iterations):
            _attend(kept, i, z, pair_bias, mask, w, sizes, inf)
            _move_on(kept, i, dropout, w)
        if every:
            ctx.save_for_backward(z, dropout, *weights, *kept)
            ctx.sizes = sizes
        states, quaternions, translations = (x[1:].unflatten(1, s.shape[:2]) for x in kept[:3])
        return states, quaternions, translations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        z, dropout, *saved = ctx.saved_tensors
        count = len(Weights._fields)
        w, kept, sizes = Weights(*saved[:count]), Kept(*saved[count:]), ctx.sizes
        flow, d_s, ds = Flow.empty(kept, z, w), None, [d.contiguous().flatten(1, 2) for d in d_outputs]
        for i in range(sizes.iterations - 1, -1, -1):
            d_features = _back_to_update(kept, flow, i, ds, d_s, dropout, w)
            d_s = _back_to_state(kept, flow, i, d_features, z, w, sizes)
        d_bias = flow.bias.sum(0).permute(0, 2, 3, 1)
        assert d_s is not None
        d_s = (d_s + flow.attended[0]).view(z.shape[0], z.shape[1], -1)
        return None, None, None, d_s, flow.z, d_bias, None, None, *_weight_gradients(kept, flow)


def obstacle(s: Tensor, z: Tensor, pair_bias: Tensor, mask: Tensor, *arguments: Any) -> str | None:
    """Why ``structure_iterations`` does not take these arguments, or None."""
    weights = arguments[1]
    if any(x.dtype != torch.float32 for x in (s, z, pair_bias, mask, *weights)):
        return "not everything is float32"
    if not all(x.numel() for x in (s, z)):
        return "an argument is empty"
    if s.shape[-1] > WIDEST:
        return f"{s.shape[-1]} channels, at most {WIDEST}"
    return f"{s.shape[1]} residues, at most {attention.LONGEST}" if s.shape[1] > attention.LONGEST else None


def structure_iterations(
    s: Tensor,
    z: Tensor,
    pair_bias: Tensor,
    mask: Tensor,
    dropout: Tensor | None,
    weights: Sequence[Tensor],
    sizes: tuple[int, ...],
    inf: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.structure_iterations``, once differentiable."""
    tensors = (s, z, pair_bias, mask, dropout, *weights)
    every = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _Iterations.apply(Sizes(*sizes), inf, every, *tensors)  # type: ignore[return-value]


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """All iterations of a benchmark crop, with dropout; see ``tuning``."""
    return [("structure_iterations", lambda: meta_call(256, 384, 128, Sizes(8, 12, 16, 4, 8)))]


def meta_call(n: int, c: int, c_z: int, sizes: Sizes) -> None:
    """Forward and backward of one sample without values, with dropout."""

    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    def linear(width: int, columns: int) -> tuple[Tensor, Tensor]:
        return leaf(width, columns), leaf(width)

    heads, norm = sizes.heads, (leaf(c), leaf(c))
    projections = 3 * heads * (sizes.width + 2 * sizes.qk_points + sizes.v_points)
    transition = [parameter for _ in range(3) for parameter in linear(c, c)]
    output = linear(c, sizes.own_features + heads * c_z)
    weights = [*linear(projections, c), leaf(heads), *output, *norm, *transition, *norm, *linear(6, c)]
    dropout, mask = leaf(sizes.iterations, 2, 1, n, c).detach(), leaf(1, n).detach()
    results = structure_iterations(
        leaf(1, n, c), leaf(1, n, n, c_z), leaf(1, n, n, heads), mask, dropout, weights, sizes, 1e5
    )
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])
