"""Names, shapes, order and start values of the parameters."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from scalefold.config import ModelConfig
from scalefold.mlperf.log.keys import PARAMETERS_COUNT
from scalefold.model import AlphaFold, cast_trunk, is_fp32_parameter
from scalefold.model.layers import LayerNorm, Linear


@pytest.fixture(scope="module")
def full_model() -> AlphaFold:
    return AlphaFold(ModelConfig(), seed=1)


def test_names_shapes_and_order_equal_the_reference_row_by_row(full_model: AlphaFold, shared_dir: Path) -> None:
    with (shared_dir / "spec" / "reference_state_dict.csv").open() as lines:
        expected = [(row["name"], tuple(map(int, row["shape"].split("x")))) for row in csv.DictReader(lines)]
    assert [(name, tuple(value.shape)) for name, value in full_model.state_dict().items()] == expected
    assert [name for name, _ in full_model.named_parameters()] == [name for name, _ in expected]


def test_the_full_model_has_the_parameters_that_the_rules_demand(full_model: AlphaFold) -> None:
    assert sum(p.numel() for p in full_model.parameters()) == PARAMETERS_COUNT
    assert all(p.dtype == torch.float32 for p in full_model.parameters())


@pytest.mark.parametrize(
    ("name", "std", "bound"),
    [
        ("input_embedder.linear_msa_m", 49**-0.5, 2.0 / 0.8796 * 49**-0.5),  # default
        ("evoformer_stack.blocks.0.core.msa_transition.linear_1", (2 / 256) ** 0.5, 2 / 0.8796 * (2 / 256) ** 0.5),
        ("evoformer_stack.blocks.0.msa_att_row.mha.linear_q", (2 / 512) ** 0.5, (6 / 512) ** 0.5),  # glorot
        ("evoformer_stack.blocks.0.msa_att_row.linear_z", 128**-0.5, None),  # normal
        ("structure_module.ipa.linear_kv", 384**-0.5, 2.0 / 0.8796 * 384**-0.5),
    ],
)
def test_random_weights_have_the_stated_spread(
    full_model: AlphaFold, name: str, std: float, bound: float | None
) -> None:
    weight = full_model.get_submodule(name).weight
    assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert bound is None or weight.abs().max().item() <= bound * 1.001


def test_constant_weights_start_as_the_specification_says(full_model: AlphaFold) -> None:
    gates = ("mha.linear_g", "linear_a_g", "linear_b_g", "global_attention.linear_g")
    finals = ("mha.linear_o", "outer_product_mean.linear_out", "bb_update.linear", "ipa.linear_out", "linear_3")
    for name, module in full_model.named_modules():
        if isinstance(module, LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        if isinstance(module, Linear) and name.endswith(gates):
            assert not module.weight.any()
            assert torch.equal(module.bias, torch.ones_like(module.bias))
        if isinstance(module, Linear) and (
            name.endswith(finals) or (name.startswith("auxiliary_heads") and "plddt" not in name)
        ):
            assert not module.weight.any(), name
    weights = nn.functional.softplus(full_model.structure_module.ipa.head_weights)
    torch.testing.assert_close(weights, torch.ones(12))


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    config = ModelConfig(evoformer={"num_blocks": 1}, extra_msa={"num_blocks": 1})
    first, again, other = (AlphaFold(config, seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_embedder.linear_msa_m.weight"], other["input_embedder.linear_msa_m.weight"])


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    AlphaFold(ModelConfig(evoformer={"num_blocks": 1}, extra_msa={"num_blocks": 1}), seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_casting_the_trunk_keeps_structure_module_and_heads_in_fp32() -> None:
    model = AlphaFold(ModelConfig(evoformer={"num_blocks": 1}, extra_msa={"num_blocks": 1}))
    cast_trunk(model, torch.bfloat16)
    kept = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"structure_module", "auxiliary_heads"}
    for name, parameter in model.named_parameters():
        assert is_fp32_parameter(name) == (parameter.dtype == torch.float32)
