"""Axial parallelism: 2, 4 and 8 ranks compute what one rank computes, in values and in every gradient."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from processes import run_ranks
from scalefold.config import EvoformerConfig, ModelConfig, TemplateConfig
from scalefold.errors import ConfigError
from scalefold.model.evoformer import EvoformerStack, ExtraMSAStack
from scalefold.model.templates import TemplatePairStack
from scalefold.model.triangle import TriangleProduct
from scalefold.parallel.dap.collectives import Group
from scalefold.parallel.dap.halves import ProductOfTwo
from scalefold.parallel.dap.points import apply_dap, check_shares, gradient_scale

STACK = EvoformerConfig(
    num_blocks=2,
    c_hidden_msa_att=4,
    num_heads_msa=2,
    c_hidden_opm=3,
    c_hidden_tri_att=4,
    num_heads_tri=2,
    c_hidden_tri_mul=8,
)
TEMPLATE = TemplateConfig(c_hidden_tri_att=4, num_heads_tri=2, c_hidden_tri_mul=8)
Result = tuple[float, np.ndarray, dict[str, np.ndarray]]


def trunk() -> nn.ModuleDict:
    """The three sharded stacks in double precision, with weights that leave no branch at zero."""
    torch.manual_seed(0)
    stacks = {
        "template_pair_stack": TemplatePairStack(6, TEMPLATE),
        "extra_msa_stack": ExtraMSAStack(8, 10, STACK),
        "evoformer_stack": EvoformerStack(12, 10, 6, STACK),
    }
    model = nn.ModuleDict(stacks).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def run_trunk(model: nn.ModuleDict, num_rows: int, num_residues: int) -> Result:
    """Loss, gradient of the pair input and of all parameters; masked positions do not enter the loss."""
    torch.manual_seed(1)
    n, double = num_residues, torch.float64
    a, m = torch.randn(1, num_rows + 2, n, 8, dtype=double), torch.randn(1, num_rows, n, 12, dtype=double)
    z, t = torch.randn(1, n, n, 10, dtype=double), torch.randn(1, 2, n, n, 6, dtype=double)
    residues = torch.ones(1, n, dtype=double)
    residues[:, -1] = 0
    pair_mask = residues[:, :, None] * residues[:, None, :]
    extra_mask = (torch.rand(1, num_rows + 2, n) > 0.2).double() * residues[:, None]
    msa_mask = (torch.rand(1, num_rows, n) > 0.2).double() * residues[:, None]
    z.requires_grad_()
    torch.manual_seed(2)
    t = model["template_pair_stack"](t, pair_mask)
    m, pair, s = model["evoformer_stack"](m, model["extra_msa_stack"](a, z, extra_mask, pair_mask), msa_mask, pair_mask)
    loss = (m * msa_mask[..., None]).sin().sum() + (pair * pair_mask[..., None]).cos().sum()
    loss = loss + (s * residues[..., None]).sum() + (t * pair_mask[:, None, ..., None]).sin().sum()
    loss.backward()
    assert z.grad is not None
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return loss.item(), z.grad.numpy(), gradients


def run_sharded(rank: int, num_rows: int, num_residues: int, training: bool, recompute: bool = False) -> Result:
    assert dist.group.WORLD is not None
    model = trunk().train(training)
    for stack in model.values():
        stack.checkpoint_blocks = recompute
    apply_dap(model, Group(dist.group.WORLD))
    loss, z_gradient, gradients = run_trunk(model, num_rows, num_residues)
    for name, value in gradients.items():
        summed = torch.from_numpy(value.copy())
        dist.all_reduce(summed)
        gradients[name] = (summed * gradient_scale(name, dp_size=1, dap_size=dist.get_world_size())).numpy()
    return loss, z_gradient, gradients


def assert_equal(sharded: Result, whole: Result) -> None:
    """Within 1e-5 of each tensor's maximum; attention logits are fp32 even here."""
    np.testing.assert_allclose(sharded[0], whole[0], rtol=1e-6)
    largest = max(np.abs(value).max() for value in whole[2].values())
    for name, value in whole[2].items():
        scale = max(np.abs(value).max(), 1e-3 * largest)
        assert np.abs(sharded[2][name] - value).max() <= 1e-5 * scale, name
    assert np.abs(sharded[1] - whole[1]).max() <= 1e-5 * np.abs(whole[1]).max()


@pytest.mark.distributed
@pytest.mark.parametrize("dap_size", [2, 4, 8])
def test_all_sizes_equal_one_rank_with_the_same_dropout(dap_size: int) -> None:
    whole = run_trunk(trunk().train(), 8, 16)
    for sharded in run_ranks(run_sharded, dap_size, 8, 16, True):
        assert_equal(sharded, whole)


@pytest.mark.distributed
@pytest.mark.parametrize("num_rows, num_residues", [(7, 10), (6, 9)])
def test_sizes_that_do_not_divide_are_padded_without_a_trace(num_rows: int, num_residues: int) -> None:
    whole = run_trunk(trunk().eval(), num_rows, num_residues)
    for sharded in run_ranks(run_sharded, 4, num_rows, num_residues, False):
        assert_equal(sharded, whole)


@pytest.mark.distributed
@pytest.mark.parametrize("outgoing", [True, False])
def test_two_ranks_compute_the_product_of_a_triangle_and_its_gradients_in_halves(outgoing: bool) -> None:
    def operands() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return tuple(torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(3))

    def share(rank: int) -> list[np.ndarray]:
        a, b, d = (x[:, :, 4 * rank : 4 * rank + 4] for x in operands())
        a, b = (x.clone().requires_grad_() for x in (a, b))
        x = ProductOfTwo(Group(dist.group.WORLD), outgoing)(a, b)
        x.backward(d)
        return [t.numpy() for t in (x.detach(), a.grad, b.grad)]

    a, b, d = operands()
    a.requires_grad_()
    b.requires_grad_()
    x = TriangleProduct(outgoing)(a, b)
    x.backward(d)
    halves = zip(*run_ranks(share, 2), strict=True)
    for (first, second), expected in zip(halves, (x.detach(), a.grad, b.grad), strict=True):
        np.testing.assert_allclose(np.concatenate([first, second], 2), expected.numpy(), rtol=1e-13, atol=1e-13)


def test_blocks_that_run_again_in_the_backward_give_the_same() -> None:
    whole = run_trunk(trunk().train(), 8, 16)
    for sharded in run_ranks(run_sharded, 2, 8, 16, True, True):
        assert_equal(sharded, whole)


def test_without_a_group_the_model_stays_as_it_is() -> None:
    model = trunk()
    before = [type(module) for module in model.modules()]
    apply_dap(model, None)
    assert [type(module) for module in model.modules()] == before


def test_only_block_parameters_carry_partial_gradients() -> None:
    assert gradient_scale("evoformer_stack.blocks.3.core.pair_transition.linear_1.weight", 4, 8) == 1 / 4
    assert gradient_scale("evoformer_stack.linear.weight", 4, 8) == 1 / 32
    assert gradient_scale("template_pair_stack.layer_norm.weight", 4, 8) == 1 / 32


def test_the_benchmark_model_can_be_shared_by_eight_and_odd_widths_are_named() -> None:
    check_shares(ModelConfig(), 8)
    with pytest.raises(ConfigError, match=r"model.template.c_hidden_tri_mul 20 must be a multiple"):
        check_shares(ModelConfig(template=TemplateConfig(c_hidden_tri_mul=20)), 8)
    with pytest.raises(ConfigError, match=r"model.c_z 64 must differ"):
        check_shares(ModelConfig(c_z=64), 2)
