"""One case per module of the model: how to build it at production sizes and run it on the reference's inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parity import golden
from scalefold.config import StructureConfig, TemplateConfig
from scalefold.model.embedders import InputEmbedder, RecyclingEmbedder
from scalefold.model.evoformer import OUTER_PRODUCT_EPS
from scalefold.model.layers import Transition
from scalefold.model.msa import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    OuterProductMean,
)
from scalefold.model.rigid import Rigid, quaternion_to_rotation
from scalefold.model.structure import InvariantPointAttention
from scalefold.model.templates import TemplatePointwiseAttention
from scalefold.model.triangle import TriangleAttention, TriangleMultiplication, around_ending_node

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A module, its place in the paper, and its update (without the residual) from named inputs.

    ``zero_gradient``: a parameter that adds a constant to all scores of a softmax, which changes nothing. Its gradient
    is rounding noise, so its size is compared with the module's largest gradient, not with the reference's noise.
    """

    title: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Inputs], tuple[Tensor, ...]]
    zero_gradient: str | None = None


@dataclass(frozen=True)
class Errors:
    """Largest relative errors of one case, and which gradient has the largest."""

    forward: float
    gradient: float
    worst_gradient: str


def _row(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return (module(x["m"], x["z"], x["mask"])[0] - x["m"],)


def _column(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return (module(x["m"], x["mask"]) - x["m"],)


def _transition(key: str) -> Callable[[nn.Module, Inputs], tuple[Tensor, ...]]:
    return lambda module, x: (module(x[key]) - x[key],)


def _triangle(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return (module(x["z"], x["mask"]) - x["z"],)


def _ending_node(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return (around_ending_node(module, x["z"], x["mask"]) - x["z"],)  # type: ignore[arg-type]


def _outer_product(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    num_samples, _, num_residues = x["mask"].shape
    num_rows = torch.einsum("bsi,bsj->bij", x["mask"], x["mask"]) + OUTER_PRODUCT_EPS
    z = torch.zeros(num_samples, num_residues, num_residues, 128)
    return (module(z, x["m"], x["mask"], num_rows)[0],)


def _pointwise(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return (module(x["t"], x["z"], x["template_mask"]),)


def _recycling(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return module(x["m0_prev"], x["z_prev"], x["x_prev"])


def _input(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    return module(x["target_feat"], x["residue_index"], x["msa_feat"])


def _points(module: nn.Module, x: Inputs) -> tuple[Tensor, ...]:
    frames = Rigid(quaternion_to_rotation(x["quats"]), x["trans"])
    return (module(x["s"], x["z"], frames, x["mask"]),)


CASES: dict[str, Case] = {
    "input_embedder": Case("Input embedder (3, 4, 5)", lambda: InputEmbedder(256, 128, 32), _input),
    "recycling_embedder": Case("Recycling embedder (32)", lambda: RecyclingEmbedder(256, 128), _recycling),
    "template_pointwise": Case(
        "Template pointwise attention (17)", lambda: TemplatePointwiseAttention(128, 64, TemplateConfig()), _pointwise
    ),
    "tri_att_start_templ": Case(
        "Triangle attention, template width (13)", lambda: TriangleAttention(64, 16, 4, 0.25), _triangle
    ),
    "extra_row_att": Case(
        "Row attention, extra MSA width (7)",
        lambda: MSARowAttentionWithPairBias(64, 128, 8, 8, 0.15),
        _row,
        zero_gradient="layer_norm_z.bias",
    ),
    "extra_col_global_att": Case("Global column attention (19)", lambda: MSAColumnGlobalAttention(64, 8, 8), _column),
    "opm_extra": Case(
        "Outer product mean, extra MSA width (10)", lambda: OuterProductMean(64, 128, 32), _outer_product
    ),
    "msa_row_att": Case(
        "Row attention with pair bias (7)",
        lambda: MSARowAttentionWithPairBias(256, 128, 32, 8, 0.15),
        _row,
        zero_gradient="layer_norm_z.bias",
    ),
    "msa_col_att": Case("Column attention (8)", lambda: MSAColumnAttention(256, 32, 8), _column),
    "msa_transition": Case("MSA transition (9)", lambda: Transition(256, 4), _transition("m")),
    "opm": Case("Outer product mean (10)", lambda: OuterProductMean(256, 128, 32), _outer_product),
    "tri_mul_out": Case(
        "Triangle multiplication, outgoing (11)", lambda: TriangleMultiplication(128, 128, True, 0.25), _triangle
    ),
    "tri_mul_in": Case(
        "Triangle multiplication, incoming (12)", lambda: TriangleMultiplication(128, 128, False, 0.25), _triangle
    ),
    "tri_att_start": Case(
        "Triangle attention, starting node (13)", lambda: TriangleAttention(128, 32, 4, 0.25), _triangle
    ),
    "tri_att_end": Case(
        "Triangle attention, ending node (14)", lambda: TriangleAttention(128, 32, 4, 0.25), _ending_node
    ),
    "pair_transition": Case("Pair transition (15)", lambda: Transition(128, 4), _transition("z")),
    "ipa": Case(
        "Invariant point attention (22)",
        lambda: InvariantPointAttention(384, 128, StructureConfig()),
        _points,
        zero_gradient="linear_b.bias",
    ),
}


def measure(name: str) -> Errors:
    """Forward and gradient errors of one case against the reference.

    Raises:
        FileNotFoundError: the numbers of this module are not at hand.
    """
    case, arrays = CASES[name], golden.load(golden.locate(f"module_{name}.npz"))
    module = case.build().eval()
    module.load_state_dict(golden.part(arrays, "w"), strict=True)
    leaves = {key: value.requires_grad_(value.is_floating_point()) for key, value in golden.part(arrays, "in").items()}
    outputs = case.run(module, _with_unit_quaternions(leaves))
    forward = max(golden.relative_error(out, arrays[f"out/{i}"]) for i, out in enumerate(outputs))
    torch.autograd.backward(outputs, [arrays[f"cotangent/{i}"] for i in range(len(outputs))])
    gradients = dict(_gradient_errors(module, leaves, arrays, case.zero_gradient))
    worst = max(gradients, key=gradients.__getitem__)
    return Errors(forward, gradients[worst], worst)


def _with_unit_quaternions(leaves: Inputs) -> Inputs:
    if "quats_unnormalised" not in leaves:
        return leaves
    quats = leaves["quats_unnormalised"]
    return leaves | {"quats": quats / quats.norm(dim=-1, keepdim=True)}


def _gradient_errors(
    module: nn.Module, leaves: Inputs, arrays: dict[str, Tensor], zero_gradient: str | None
) -> Iterator[tuple[str, float]]:
    for key, expected in golden.part(arrays, "gin").items():
        leaf = leaves["quats_unnormalised"] if key == "quats" else leaves[key]
        yield f"input {key}", golden.relative_error(leaf.grad, expected)
    scale = torch.stack([value.abs().max() for value in golden.part(arrays, "gw").values()]).max()
    for key, expected in golden.part(arrays, "gw").items():
        gradient = module.get_parameter(key).grad
        is_zero = key == zero_gradient
        yield key, (gradient.abs().max() / scale).item() if is_zero else golden.relative_error(gradient, expected)
    for key, expected in golden.part(arrays, "gwnorm").items():
        yield f"norm of {key}", golden.relative_error(module.get_parameter(key).grad.norm(), expected)
