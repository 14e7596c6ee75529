"""Every operation of the model in plain PyTorch: the definition that faster versions are tested against.

Shapes use the paper's letters: B batch, S rows (sequences, or pair rows i), N residues, H heads, D head width,
c channels. Tensors may have any strides: transposed views are passed instead of transposed copies. Statistics,
softmax and sums over scores are taken in fp32 whatever the storage type; results return in the type of the input.
Residual operations return ``x + dropout * update``; ``dropout`` is a ready fp32 multiplicative mask that broadcasts
over the update (kept entries hold 1 / (1 - rate)), or None.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalefold.kernels.destination import Destination, OfOperands

LAYER_NORM_EPS = 1e-5
POINT_ERROR_EPS = 1e-4  # under the root of a distance
NAMING_EPS = 1e-10  # the same, and of a distance's error
ATOMS = 14  # slots of a residue
# those that can be ambiguous: OD1/2, OE1/2, CD1/2, CE1/2 of ASP, GLU, PHE, TYR
FIRST_AMBIGUOUS, LAST_AMBIGUOUS = 6, 10


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the last dimension. x: [*, c]; weight, bias: [c] -> [*, c]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, LAYER_NORM_EPS)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    destination: Destination | None = None,
) -> tuple[Tensor, ...]:
    """Several projections of one layer norm. x: [*, c]; weights: [c_i, c] each -> x itself, then [*, c_i] each.

    destination: where the last one may be written instead. A residual connection takes x from the result: the two
    gradients of x then meet in one operation.
    """
    normed = layer_norm(x, norm_weight, norm_bias)
    return x, *(F.linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float) -> Tensor:
    """Softmax attention along N within every row (core of Supplement Algorithms 7, 8, 13, 14).

    q, k, v: [B, S, N, H, D], unscaled; mask over keys: [B, S, N], 1 = keep; bias: [B, H, N, N], the same for all
    rows, or None -> [B, S, N, H, D]. Logits = q.k / sqrt(D) + (mask - 1) * inf + bias, in this order and in fp32:
    a row without any key left then weighs all keys alike, as the reference does.
    """
    scale = q.shape[-1] ** -0.5
    logits = torch.einsum("bsqhd,bskhd->bshqk", q.float() * scale, k.float())
    logits = logits + (mask.float() - 1.0)[:, :, None, None, :] * inf
    if bias is not None:
        logits = logits + bias.float()[:, None]
    weights = torch.softmax(logits, dim=-1)
    return torch.einsum("bshqk,bskhd->bsqhd", weights.to(v.dtype), v).to(q.dtype)


def add_residual(x: Tensor, update: Tensor, dropout: Tensor | None) -> Tensor:
    """x + dropout * update, in the type of x; the product is taken in fp32 (a bf16 mask scales by 1.336, not 1.333)."""
    return x + update if dropout is None else (x + update * dropout).to(x.dtype)


def gated_output(
    x: Tensor,
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout: Tensor | None,
    destination: Destination | None = None,
) -> Tensor:
    """x + dropout * (W (sigmoid(gate) * o) + b), the end of every gated attention.

    x: [*, c]; o: [*, H, D]; gate (logits): [*, H * D]; weight: [c, H * D]; bias: [c] -> [*, c].
    destination: where the result may be written instead.
    """
    gated = torch.sigmoid(gate) * o.flatten(-2)
    return add_residual(x, F.linear(gated, weight, bias), dropout)


def transition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """x + W2 relu(W1 LN(x) + b1) + b2 (Supplement Algorithms 9, 15). x: [*, c]; weight_1: [n c, c] -> [*, c]."""
    hidden = F.relu(F.linear(layer_norm(x, norm_weight, norm_bias), weight_1, bias_1))
    return x + F.linear(hidden, weight_2, bias_2)


def outer_product_project(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    destination: Destination | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked projections a, b of Supplement Algorithm 10.

    m: [B, S, N, c_m]; mask: [B, S, N] -> m itself (see ``layer_norm_linear``), a, b: [B, S, N, c].
    destination: where b may be written instead.
    """
    normed = layer_norm(m, norm_weight, norm_bias)
    keep = mask[..., None].to(m.dtype)
    return m, F.linear(normed, weight_1, bias_1) * keep, F.linear(normed, weight_2, bias_2) * keep


def outer_product_update(z: Tensor, a: Tensor, b: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """z + (W vec(sum_s a_si (x) b_sj) + bias) / norm_ij (Supplement Algorithm 10).

    z: [B, I, J, c_z]; a: [B, S, I, c]; b: [B, S, J, c]; norm: [B, I, J], the fp32 count of common rows plus eps;
    weight: [c_z, c * c] with the channel of a as the slow index -> [B, I, J, c_z].
    """
    outer = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2)
    update = F.linear(outer, weight, bias).float() / norm[..., None]
    return (z + update).to(z.dtype)


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
    """Gated, masked operands of the triangle multiplication, channels first (Supplement Algorithms 11, 12, lines 1-2).

    z: [B, I, J, c_z]; mask: [B, I, J]; weights: [c, c_z] -> z itself (see ``layer_norm_linear``), a, b: [B, c, I, J].
    destinations: where a and b may be written instead.
    """
    normed = layer_norm(z, norm_weight, norm_bias)
    keep = mask[..., None].to(z.dtype)
    a = torch.sigmoid(F.linear(normed, weight_a_gate, bias_a_gate)) * F.linear(normed, weight_a, bias_a) * keep
    b = torch.sigmoid(F.linear(normed, weight_b_gate, bias_b_gate)) * F.linear(normed, weight_b, bias_b) * keep
    return z, a.permute(0, 3, 1, 2).contiguous(), b.permute(0, 3, 1, 2).contiguous()


def triangle_product(a: Tensor, b: Tensor, outgoing: bool) -> Tensor:
    """x_ij = sum_k a_ik b_jk (outgoing) or sum_k a_ki b_kj (incoming) per channel. a, b: [B, c, N, N] -> same."""
    return a @ b.transpose(-1, -2) if outgoing else a.transpose(-1, -2) @ b


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
    """z + dropout * sigmoid(W_g LN_in(z) + b_g) * (W_z LN_out(x) + b_z) (Supplement Algorithms 11, 12, lines 3-4).

    z: [B, I, J, c_z]; x: [B, c, I, J], channels first; weight_z: [c_z, c]; weight_g: [c_z, c_z] -> [B, I, J, c_z].
    """
    gate = torch.sigmoid(F.linear(layer_norm(z, norm_in_weight, norm_in_bias), weight_g, bias_g))
    value = F.linear(layer_norm(x.permute(0, 2, 3, 1), norm_out_weight, norm_out_bias), weight_z, bias_z)
    return add_residual(z, gate * value, dropout)


def global_attention(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    weight_g: Tensor,
    bias_g: Tensor,
    weight_o: Tensor,
    bias_o: Tensor,
    num_heads: int,
    inf: float,
    eps: float,
) -> Tensor:
    """m + global column attention (Supplement Algorithm 19): one mean query per column, one shared key/value head.

    m: [B, S, N, c]; mask: [B, S, N]; weight_q, weight_g: [H * D, c]; weight_k, weight_v: [D, c];
    weight_o: [c, H * D] -> [B, S, N, c]. Softmax over the S sequences of each residue column.
    """
    normed = layer_norm(m, norm_weight, norm_bias)
    keep = mask.float()
    mean = (normed.float() * keep[..., None]).sum(1) / (keep.sum(1) + eps)[..., None]
    head_width = weight_k.shape[0]
    q = F.linear(mean.to(m.dtype), weight_q).float() * head_width**-0.5
    k, v = F.linear(normed, weight_k), F.linear(normed, weight_v)
    logits = torch.einsum("bnhd,bsnd->bnhs", q.unflatten(-1, (num_heads, head_width)), k.float())
    logits = logits + ((keep - 1.0) * inf).transpose(1, 2)[:, :, None]
    o = torch.einsum("bnhs,bsnd->bnhd", torch.softmax(logits, dim=-1).to(v.dtype), v)
    gate = F.linear(normed, weight_g, bias_g)
    return gated_output(m, o[:, None].expand(-1, m.shape[1], -1, -1, -1), gate, weight_o, bias_o, None)


def invariant_point_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    bias: Tensor,
    z: Tensor,
    point_weights: Tensor,
    mask: Tensor,
    inf: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of Supplement Algorithm 22 between residues with frames; all in fp32.

    Products with coordinates are sums of products, forward and backward: a matrix product would follow the tf32 switch.

    q, k: [B, N, H, D]; v: [B, N, H, D]; q_points, k_points: [B, N, H, P_q, 3] and v_points: [B, N, H, P_v, 3] in the
    global frame; bias: [B, N, N, H]; z: [B, N, N, c_z]; point_weights: [H], softplus(gamma) * sqrt(2 / (27 P_q));
    mask: [B, N] -> o [B, N, H, D], o_points (global frame) [B, N, H, P_v, 3], o_pair [B, N, H, c_z].
    """
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * (3.0 * q.shape[-1]) ** -0.5
    logits = logits + bias.permute(0, 3, 1, 2) * (1.0 / 3.0) ** 0.5
    distance_sq = (q_points[:, :, None] - k_points[:, None]).square().sum(-1).sum(-1)
    logits = logits - 0.5 * (distance_sq * point_weights).permute(0, 3, 1, 2)
    pair_mask = mask[:, :, None] * mask[:, None, :]
    weights = torch.softmax(logits + (pair_mask - 1.0)[:, None] * inf, dim=-1)
    o = torch.einsum("bhij,bjhd->bihd", weights, v)
    o_points = (weights.permute(0, 2, 3, 1)[..., None, None] * v_points[:, None]).sum(2)
    o_pair = torch.einsum("bhij,bijc->bihc", weights, z)
    return o, o_points, o_pair


def structure_iterations(
    s: Tensor,
    z: Tensor,
    pair_bias: Tensor,
    mask: Tensor,
    dropout: Tensor | None,
    weights: Sequence[Tensor],
    sizes: tuple[int, ...],
    inf: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """All iterations of the structure module (Supplement Algorithm 20, lines 5 to 10) in one operation; in fp32.

    The definition is ``StructureModule.iteration``, one after the other: None, as here, sends the caller there.

    s: [B, N, c_s], normed and projected; z: [B, N, N, c_z], normed; pair_bias: [B, N, N, H]; mask: [B, N]; dropout:
    masks [I, 2, B, N, c_s] or None; weights: weight and bias, [out, in] and [out], of the projections of s (q, kv, q
    points, kv points together), then the point weights [H], then again weight and bias of the output's projection,
    first layer norm, three layers of the transition, second layer norm, backbone update; sizes: iterations I, heads,
    channels, query and value points of a head -> states [I, B, N, c_s], quaternions [I, B, N, 4], translations
    [I, B, N, 3] in internal units. Frames start as identities; quaternions carry no gradient between iterations.
    """
    return None


def elsewhere(*arguments: Any, **named: Any) -> None:
    """An operation that the model defines by others: None sends the caller to that definition."""


def linear_head(x: Tensor, weight: Tensor, bias: Tensor, symmetric: bool) -> Tensor:
    """Logits of a linear layer in the type of its weights; ``symmetric``: those of (i, j) and (j, i) added.

    x: [*, c], or [B, N, N, c] if symmetric; weight: [classes, c]; bias: [classes] -> [*, classes].
    """
    logits = F.linear(x.to(weight.dtype), weight, bias)
    return logits + logits.transpose(1, 2) if symmetric else logits


def better_naming(predicted: Tensor, truth: Tensor, alternative: Tensor, exists: Tensor, ambiguous: Tensor) -> Tensor:
    """Residues whose ambiguous atoms fit the prediction better under their alternative names; all in fp32.

    By distances to the unambiguous atoms of all residues (Supplement Algorithm 26). Positions: [B, N, 14, 3]; exists,
    ambiguous: [B, N, 14] -> 0 or 1, [B, N].
    """
    slots = slice(FIRST_AMBIGUOUS, LAST_AMBIGUOUS)

    def distances_to_all(atoms: Tensor) -> Tensor:  # [B, N, 4, N, 14]
        difference = atoms[:, :, slots, None, None] - atoms[:, None, None]
        return torch.sqrt(NAMING_EPS + difference.square().sum(-1))

    found = distances_to_all(predicted)
    mask = (exists * ambiguous)[:, :, slots, None, None] * (exists * (1.0 - ambiguous))[:, None, None]

    def misfit(candidate: Tensor) -> Tensor:
        error = torch.sqrt(NAMING_EPS + (found - distances_to_all(candidate)).square())
        return (error * mask).sum((2, 3, 4))

    return (misfit(alternative) < misfit(truth)).float()


def point_errors(
    rotation: Tensor,
    translation: Tensor,
    target_rotation: Tensor,
    target_translation: Tensor,
    frames_mask: Tensor,
    points: Tensor,
    target_points: Tensor,
    points_mask: Tensor,
    clamp_weight: Tensor,
    clamp: float,
) -> Tensor:
    """Masked sum over frames and points of the errors of Supplement Algorithm 28; all in fp32.

    rotation: [*, F, 3, 3]; translation: [*, F, 3]; points: [*, P, 3]; targets like them; masks: [*, F], [*, P];
    clamp_weight: [*], the share of min(e, clamp) in a cost, e itself has the rest -> [*]. Leading dimensions of the
    targets and masks broadcast. Rotations are inverted by transposing.
    """

    def seen(rotation: Tensor, translation: Tensor, points: Tensor) -> Tensor:
        x, y, z = (points[..., None, :, :] - translation[..., :, None, :])[..., None].unbind(-2)
        row = rotation[..., :, None, :, :].unbind(-2)
        return row[0] * x + row[1] * y + row[2] * z

    difference = seen(rotation, translation, points) - seen(target_rotation, target_translation, target_points)
    error = torch.sqrt(difference.square().sum(-1) + POINT_ERROR_EPS)
    share = clamp_weight[..., None, None]
    cost = share * error.clamp(max=clamp) + (1.0 - share) * error
    return (cost * frames_mask[..., :, None] * points_mask[..., None, :]).sum((-1, -2))


def dropout_mask(shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    """fp32 mask: 0 with probability ``rate``, else 1 / (1 - rate), from the device's default generator."""
    return (torch.rand(tuple(shape), device=device) >= rate).float() / (1.0 - rate)


def adam_swa(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averaged: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    beta_1: float,
    beta_2: float,
    eps: float,
    swa_decay: float,
) -> None:
    """Clipped Adam step and weight averaging, in place on flat fp32 buffers.

    param, exp_avg, exp_avg_sq, averaged: fp32 [n]; grad: fp32 or bf16 [n], neither scaled nor clipped yet; ``copy``:
    low-precision compute weights [n] that follow the parameters, or None. ``scalars`` is a device tensor fp32 [5], so
    that a captured graph reads new values at each replay: factor on the gradient (clip coefficient times gradient
    scale), learning rate, 1 - beta_1^t, sqrt(1 - beta_2^t), and 1 where the average must copy instead of average
    (first update), else 0.
    m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p -= lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) + eps);
    avg = copy ? p : avg + (1 - decay) (p - avg).   Spec: benchmark training specification, sections 3 and 4.
    """
    factor, lr, correction_1, correction_2_sqrt, replace = scalars.unbind()
    g = grad.float() * factor
    exp_avg.lerp_(g, 1.0 - beta_1)
    exp_avg_sq.mul_(beta_2).addcmul_(g, g, value=1.0 - beta_2)
    denominator = exp_avg_sq.sqrt().div_(correction_2_sqrt).add_(eps)
    param.sub_(exp_avg / denominator * (lr / correction_1))
    weight = torch.where(replace > 0, torch.ones_like(replace), torch.full_like(replace, 1.0 - swa_decay))
    averaged.lerp_(param, weight)
    if copy is not None:
        copy.copy_(param)


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum of squares of a flat buffer, fp32 or bf16 [n] -> fp32 scalar on the device."""
    return values.float().square().sum()
