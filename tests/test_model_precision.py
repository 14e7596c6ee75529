"""bf16 against fp32 on the small model, and the fp32 islands: moving any of them to bf16 fails a test."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loose_products import FAR, LooseProducts
from parity import golden
from scalefold.config import LossConfig
from scalefold.eval.model import precision
from scalefold.model import AlphaFold, cast_trunk, loss, select_slice
from scalefold.model.rigid import Rigid

Gradients = dict[str, Tensor]


def run(dtype: torch.dtype, passes: int = 1) -> tuple[AlphaFold, dict[str, Tensor], Tensor]:
    model, batch = golden.small_model(), golden.small_batch()
    cast_trunk(model, dtype)
    outputs = model(batch, passes)
    total, terms = loss.alphafold_loss(outputs, select_slice(batch, passes - 1), LossConfig())
    total.backward()
    return model, outputs | terms, total


@pytest.fixture(scope="module")
def both() -> dict[torch.dtype, tuple[AlphaFold, dict[str, Tensor], Tensor]]:
    return {dtype: run(dtype) for dtype in (torch.float32, torch.bfloat16)}


def test_losses_in_bf16_are_close_to_fp32(both) -> None:
    exact, rounded = (both[dtype][1] for dtype in (torch.float32, torch.bfloat16))
    for term in ("fape", "supervised_chi", "distogram", "masked_msa", "weighted_total_loss"):
        assert rounded[term].item() == pytest.approx(exact[term].item(), rel=0.01), term
    # The confidence target is a bin of the achieved lDDT: small moves of the coordinates change it by whole bins.
    assert rounded["plddt_loss"].item() == pytest.approx(exact["plddt_loss"].item(), rel=0.1)


def test_gradients_in_bf16_point_where_those_in_fp32_do(both) -> None:
    """Cosine per module of the small model; random weights of order one make it rounder than a trained model."""
    for prefix in (
        "input_embedder",
        "extra_msa_stack",
        "evoformer_stack",
        "structure_module",
        "auxiliary_heads",
        "template",
    ):
        flat = []
        for dtype in (torch.float32, torch.bfloat16):
            parameters = both[dtype][0].named_parameters()
            flat.append(torch.cat([p.grad.float().flatten() for name, p in parameters if name.startswith(prefix)]))
        assert torch.cosine_similarity(flat[0], flat[1], dim=0).item() >= 0.98, prefix


def test_the_trunk_computes_in_bf16_and_the_islands_in_fp32(both) -> None:
    _, outputs, total = both[torch.bfloat16]
    assert {name: outputs[name].dtype for name in ("msa", "pair", "single")} == dict.fromkeys(
        ("msa", "pair", "single"), torch.bfloat16
    )
    islands = [name for name in outputs if name.startswith(("sm_", "final_")) or "logits" in name]
    assert len(islands) == 14
    assert {outputs[name].dtype for name in islands} == {torch.float32}
    assert total.dtype == torch.float32


def test_gradients_have_the_type_of_their_parameter(both) -> None:
    assert all(p.grad.dtype == p.dtype for p in both[torch.bfloat16][0].parameters())


def test_recycled_coordinates_stay_fp32_and_representations_take_the_trunks_type() -> None:
    model, batch = golden.small_model(), golden.small_batch()
    cast_trunk(model, torch.bfloat16)
    first = model.nothing_recycled(batch)
    with torch.no_grad():
        second = model.iteration(select_slice(batch, 0), first)[1]
    for recycled in (first, second):
        assert [x.dtype for x in recycled] == [torch.bfloat16, torch.bfloat16, torch.float32]


class WatchTypes(TorchDispatchMode):
    """Notes every operation that takes or gives bf16 while active."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, Tensor)]
        if any(x.dtype == torch.bfloat16 for x in tensors):
            self.reduced.append(str(func))
        return result


@contextmanager
def watched(module: nn.Module) -> Iterator[WatchTypes]:
    """Watch everything that happens inside one module's forward."""
    mode, forward = WatchTypes(), module.forward

    def watching(*args, **kwargs):
        with mode:
            return forward(*args, **kwargs)

    module.forward = watching
    yield mode


@pytest.mark.parametrize("island", ["structure_module", "auxiliary_heads"])
def test_inside_an_island_bf16_is_only_ever_converted(island: str) -> None:
    model, batch = golden.small_model(), golden.small_batch()
    cast_trunk(model, torch.bfloat16)
    with watched(model.get_submodule(island)) as mode, torch.no_grad():
        model(batch, 1)
    assert set(mode.reduced) <= {"aten._to_copy.default", "aten.detach.default"}
    assert mode.reduced


def test_moving_an_island_to_bf16_is_noticed() -> None:
    """The check above has teeth: with bf16 weights in the island it sees arithmetic in bf16."""
    model, batch = golden.small_model(), golden.small_batch()
    cast_trunk(model, torch.bfloat16)
    model.auxiliary_heads.to(torch.bfloat16)
    for module in model.auxiliary_heads.modules():
        module.register_forward_pre_hook(
            lambda _, args: tuple(x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in args)
        )
    with watched(model.auxiliary_heads) as mode, torch.no_grad():
        model(batch, 1)
    assert set(mode.reduced) - {"aten._to_copy.default", "aten.detach.default"}


def test_distances_and_bins_do_not_depend_on_the_trunks_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Template and recycling distograms of a bf16 trunk are those of the fp32 trunk, bit for bit."""
    from scalefold.model import embedders, templates

    seen: dict[str, list[Tensor]] = {"template": [], "recycling": []}
    plain_template, plain_recycling = templates.template_distogram, embedders.RecyclingEmbedder.distogram

    def template(x: Tensor, dtype: torch.dtype) -> Tensor:
        return note(seen["template"], plain_template(x, dtype))

    def recycling(x: Tensor, dtype: torch.dtype) -> Tensor:
        return note(seen["recycling"], plain_recycling(x, dtype))

    monkeypatch.setattr(templates, "template_distogram", template)
    monkeypatch.setattr(embedders.RecyclingEmbedder, "distogram", staticmethod(recycling))
    batch = golden.small_batch()
    shifted = batch | {"template_pseudo_beta": batch["template_pseudo_beta"] + 100.0}
    for dtype in (torch.float32, torch.bfloat16):
        model = golden.small_model()
        cast_trunk(model, dtype)
        recycled = model.nothing_recycled(batch)._replace(x=batch["all_atom_positions"] + 100.0)
        with torch.no_grad():
            model.iteration(select_slice(shifted, 0), recycled)
    for found in seen.values():
        assert [x.dtype for x in found] == [torch.float32, torch.bfloat16]
        assert torch.equal(found[0], found[1].float())


def note(seen: list[Tensor], value: Tensor) -> Tensor:
    seen.append(value)
    return value


def test_attention_probabilities_and_layer_norm_statistics_are_fp32() -> None:
    """Scores in bf16 would differ by up to 2^-8 of their size; in fp32 only inputs and output are rounded."""
    from scalefold.kernels import reference

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 2, 16, generator=generator).bfloat16() for _ in range(3))
    q = q * 8
    mask = torch.ones(1, 2, 64)
    rounded = reference.attention(q, k, v, mask, None, 1e9)
    exact = reference.attention(q.double().float(), k.float(), v.float(), mask, None, 1e9)
    assert (rounded.float() - exact).abs().max().item() <= 0.02
    x = (100.0 + torch.randn(4, 256, generator=generator)).bfloat16()
    weight, bias = torch.ones(256).bfloat16(), torch.zeros(256).bfloat16()
    normed = reference.layer_norm(x, weight, bias).float()
    torch.testing.assert_close(normed, reference.layer_norm(x.float(), weight.float(), bias.float()), atol=0.02, rtol=0)


def test_dropout_scales_in_fp32_whatever_the_type_of_the_update() -> None:
    """A bf16 mask would scale survivors by 1.3359 instead of 1.3333."""
    from scalefold.kernels import reference

    update = torch.full((4, 4), 3.0, dtype=torch.bfloat16)
    mask = torch.full((1, 4), 1.0 / 0.75)
    result = reference.add_residual(torch.zeros(4, 4, dtype=torch.bfloat16), update, mask)
    assert torch.equal(result, torch.full((4, 4), 4.0, dtype=torch.bfloat16))


def test_rigid_algebra_never_calls_a_matrix_product() -> None:
    """TF32 and autocast act on matrix products only; coordinates must not pass through one."""
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    batch, outputs = (
        select_slice(golden.small_batch(), 0),
        golden.part(golden.load(golden.locate("model_r0.npz")), "out"),
    )
    with Watch():
        loss.backbone_fape(outputs, batch)
        loss.sidechain_fape(outputs, batch)
        frames = Rigid.from_quaternion_and_translation(outputs["final_affine_tensor"])
        frames.compose(frames).apply(frames.translation)
    assert calls
    assert [name for name in calls if name.startswith(("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"))] == []


def test_no_product_that_may_use_tf32_takes_a_coordinate_in_forward_or_backward() -> None:
    """Structure module, frames, atoms and FAPE, with everything moved far away from the origin."""
    module, batch = golden.small_model().structure_module, select_slice(golden.small_batch(), 0)
    quaternion, translation = module._identity_frames(batch["msa_feat"][:, 0])
    module._identity_frames = lambda s: (quaternion, translation + FAR)  # type: ignore[method-assign]
    generator, (b, n) = torch.Generator().manual_seed(0), batch["aatype"].shape
    s, z = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((b, n, module.linear_in.in_features), (b, n, n, module.layer_norm_z.weight.numel()))
    )
    with precision("tf32"), LooseProducts() as mode:
        outputs = module(s, z, batch["seq_mask"], batch["aatype"])._asdict()
        (loss.backbone_fape(outputs, batch) + loss.sidechain_fape(outputs, batch)).sum().backward()
    assert outputs["sm_positions"].abs().max() > FAR
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert mode.seen > 50  # the layers and the products with the pair representation
    assert mode.with_coordinates == []
