"""Triton invariant point attention against its plain definition."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw, results
from launches import Launches
from loose_products import FAR, LooseProducts
from scalefold.config import StructureConfig
from scalefold.eval.model import precision
from scalefold.kernels import reference, rows, triton_ops, tuning
from scalefold.kernels.ops import point_attention
from scalefold.kernels.table import use_operations
from scalefold.model.rigid import Rigid
from scalefold.model.structure import MASK_INF, InvariantPointAttention

RELATIVE = 1e-5
RESULTS = (
    "o", "o_points", "o_pair", "d_q", "d_k", "d_v", "d_q_points", "d_k_points", "d_v_points", "d_bias", "d_z",
    "d_point_weights",
)  # fmt: skip
KERNELS = ("_pack_kernel", "_forward_kernel", "_rows_kernel", "_columns_kernel")
VIEWS = ("empty", "view", "slice", "select", "transpose", "permute", "unbind", "split", "detach", "expand", "alias")


def make_leaves(
    batch: int, n: int, heads: int, width: int = 16, qk_points: int = 4, v_points: int = 8, c_z: int = 24
) -> list[Tensor]:
    """All inputs that get a gradient; q, k, v and the points are strided views, as the structure module passes them."""
    draw = Draw(batch + n + heads)
    projected = draw(batch, n, heads * 3 * width + 7)
    q, kv = projected.split([heads * width, 2 * heads * width, 7], dim=-1)[:2]
    k, v = kv.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
    points = 2.0 * draw(batch, n, 3, heads, 2 * qk_points + v_points).movedim(2, -1) + 5.0
    bias, z = draw(batch, n, n, heads), draw(batch, n, n, c_z)
    point_weights = draw(heads).abs() * 0.1
    return [
        q.unflatten(-1, (heads, -1)), k, v, *points.split((qk_points, qk_points, v_points), dim=-2), bias, z,
        point_weights,
    ]  # fmt: skip


def assert_agrees(leaves: list[Tensor], mask: Tensor, inf: float = MASK_INF) -> None:
    """Outputs and all gradients, each in norm."""
    ours, plain = (
        results(lambda *inputs, function=function: function(*inputs, mask, inf), leaves, torch.float32)
        for function in (point_attention.invariant_point_attention, reference.invariant_point_attention)
    )
    for name, own, expected in zip(RESULTS, ours, plain, strict=True):
        assert own.shape == expected.shape, name
        error = ((own - expected).norm() / expected.norm().clamp_min(1e-6)).item()
        assert error <= RELATIVE, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("batch", "n", "heads"), [(1, 5, 3), (1, 17, 3), (2, 17, 2), (1, 1, 1), (1, 32, 3)])
def test_outputs_and_gradients_are_those_of_the_definition(batch, n, heads):
    mask = torch.ones(batch, n, device=DEVICE)
    assert_agrees(make_leaves(batch, n, heads), mask)


@pytest.mark.parametrize("inf", [MASK_INF, 1e9])
def test_masked_residues_and_a_sample_without_any_are_treated_as_in_the_definition(inf):
    mask = torch.ones(2, 17, device=DEVICE)
    mask[0, [0, 3, 4, 16]] = 0.0
    mask[1] = 0.0
    assert_agrees(make_leaves(2, 17, 3), mask, inf)


def test_a_row_without_any_key_left_weighs_all_residues_alike_where_inf_swallows_the_logits():
    leaves = make_leaves(1, 6, 2)
    o, _, o_pair = point_attention.invariant_point_attention(*leaves, torch.zeros(1, 6, device=DEVICE), 1e12)
    v, z = leaves[2], leaves[7]
    torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o))
    torch.testing.assert_close(o_pair, z.mean(2)[:, :, None].expand_as(o_pair))


def test_odd_widths_and_transposed_pair_inputs_are_accepted():
    leaves = make_leaves(1, 9, 2, width=5, qk_points=3, v_points=1, c_z=7)
    leaves[6] = leaves[6].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    leaves[7] = leaves[7].transpose(1, 2).contiguous().transpose(1, 2)
    mask = (torch.arange(18, device=DEVICE) % 8 > 0).float()[None, ::2]
    assert_agrees(leaves, mask)


@pytest.mark.parametrize("block", [1, 4])
def test_the_number_of_rows_per_program_does_not_change_results(block):
    """Not by a bit where programs are interpreted; compiled, sums inside a program come in another order."""
    leaves, mask = make_leaves(1, 11, 2), torch.ones(1, 11, device=DEVICE)
    mask[0, 2] = 0.0

    def run() -> list[Tensor]:
        return results(lambda *x: point_attention.invariant_point_attention(*x, mask, MASK_INF), leaves, torch.float32)

    expected = run()
    config = {"BLOCK": block, "num_warps": 4}
    with (
        tuning.override("point_attention_forward", config),
        tuning.override("point_attention_rows", config),
        tuning.override("point_attention_columns", config),
    ):
        found = run()
    for name, own, other in zip(RESULTS[:-1], found, expected, strict=False):
        if DEVICE == "cpu":
            assert torch.equal(own, other), name
        assert (own - other).norm() <= RELATIVE * other.norm().clamp_min(1.0), name
    torch.testing.assert_close(found[-1], expected[-1], rtol=RELATIVE, atol=0.0)  # one partial sum per program


def test_distances_far_from_the_origin_do_not_cancel():
    leaves, mask = make_leaves(1, 8, 2), torch.ones(1, 8, device=DEVICE)
    points = [(x * 64).round() / 64 for x in leaves[3:5]]

    def o_of(shift: float) -> Tensor:
        moved = [x + shift for x in points]
        return point_attention.invariant_point_attention(*leaves[:3], *moved, *leaves[5:], mask, MASK_INF)[0]

    assert torch.equal(o_of(4096.0), o_of(0.0))


def test_the_structure_module_gives_the_same_with_these_kernels():
    draw = Draw(5)
    mask = draw.mask(1, 7)
    module = InvariantPointAttention(32, 16, StructureConfig(num_heads_ipa=3)).to(DEVICE)
    rotation = torch.linalg.qr(draw(1, 7, 3, 3).cpu())[0].to(DEVICE)
    leaves = [draw(1, 7, 32), draw(1, 7, 7, 16), rotation, draw(1, 7, 3)]
    leaves += [0.2 * draw(*parameter.shape) for parameter in module.parameters()]

    def update(s: Tensor, z: Tensor, rotation: Tensor, translation: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (s, z, Rigid(rotation, translation), mask))

    plain = results(update, leaves, torch.float32)
    use_operations(module, triton_ops.TRITON)
    for own, expected in zip(results(update, leaves, torch.float32), plain, strict=True):
        assert (own - expected).norm() <= RELATIVE * expected.norm().clamp_min(1.0)  # the bias of linear_b gets 0


@pytest.mark.parametrize(
    ("function", "gradient"),
    [(point_attention, 1.0), (point_attention, FAR), (reference, 1.0)],  # large ones reach the definition's q and k
    ids=["kernels", "kernels, gradients", "definition"],
)
def test_products_with_coordinates_or_their_gradients_never_use_tf32(function, gradient):
    leaves = [leaf.detach().requires_grad_() for leaf in make_leaves(1, 5, 3)]
    far = [leaf + FAR if leaf.shape[-1] == 3 and leaf.dim() == 5 else leaf for leaf in leaves]
    with precision("tf32"), LooseProducts() as mode:
        outputs = function.invariant_point_attention(*far, torch.ones(1, 5, device=DEVICE), MASK_INF)
        gradients = [torch.full_like(output, gradient if output.dim() == 5 else 1.0) for output in outputs]
        torch.autograd.backward(outputs, gradients)
        assert torch.backends.cuda.matmul.allow_tf32
    assert all(leaf.grad is not None for leaf in leaves)
    assert mode.seen >= 3  # weights and pair representation: one product forward, two backward
    assert mode.with_coordinates == []


class PointLaunches(Launches):
    """Of point attention, and no operand of a product that the library would copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = [*((point_attention, name) for name in KERNELS), (rows, "_sum_kernel")]
        super().__init__(monkeypatch, kernels, lambda name: any(part in name for part in VIEWS))

    def check(self, name: str, args: tuple) -> None:
        if "bmm" in name:  # the library copies an operand whose rows and columns are both strided
            assert all(1 in x.stride()[-2:] for x in args if isinstance(x, Tensor)), name


def meta_inputs(n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaves like ``make_leaves``, and a mask, without values."""
    inputs = [*make_leaves(1, n, 2), torch.ones(1, n)]
    return [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta", requires_grad=True) for x in inputs]


def test_the_number_of_launches_is_small_whatever_the_strides(monkeypatch):
    inputs = meta_inputs(24)
    with PointLaunches(monkeypatch) as launches:
        outputs = point_attention.invariant_point_attention(*inputs, MASK_INF)
        assert launches.names == ["_pack_kernel", "_forward_kernel", "bmm", "bmm"]
        launches.names.clear()
        torch.autograd.grad(outputs, inputs[:-1], [torch.empty_like(x) for x in outputs])
    expected = ["_pack_kernel", "bmm", "baddbmm_", "_rows_kernel", "_columns_kernel", "_sum_kernel", "bmm", "bmm"]
    assert launches.names == expected


@pytest.mark.gpu
@pytest.mark.parametrize("n", [256, 301, 704])
def test_full_sizes_agree_with_the_definition(n):
    mask = torch.ones(1, n, device=DEVICE)
    mask[0, n // 3 : n // 2] = 0.0
    with point_attention.full_fp32():
        assert_agrees(make_leaves(1, n, 12, c_z=128), mask, 60.0)  # of a logit beside 1e5 only two digits are left
