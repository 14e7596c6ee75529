"""Reads the reference's numbers and turns them into our configuration, weights and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from conftest import REPOSITORY, find_shared
from scalefold.config import EvoformerConfig, HeadsConfig, ModelConfig, StructureConfig, TemplateConfig
from scalefold.data.batch_keys import PER_SLICE_KEYS
from scalefold.model import AlphaFold


def locate(name: str) -> Path:
    """File of the reference's numbers: the small ones lie in tests/data, all of them in the reference material.

    Raises:
        FileNotFoundError: neither place has it.
    """
    shared = find_shared()
    folders = [REPOSITORY / "tests" / "data" / "golden"] + ([shared / "golden"] if shared else [])
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name}: not in tests/data/golden; set SCALEFOLD_SHARED to the reference material folder")


def locate_or_skip(name: str) -> Path:
    """The same within a test: skip with the reason if the file is absent."""
    try:
        return locate(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def load(file: Path) -> dict[str, Tensor]:
    """All arrays of one file as tensors."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Arrays whose name starts with ``prefix/``, without it."""
    return {name.removeprefix(prefix + "/"): value for name, value in arrays.items() if name.startswith(prefix + "/")}


def small_model_config() -> ModelConfig:
    """Sizes of the reference's small model."""
    c = yaml.safe_load(locate("small_config.yaml").read_text())
    template, pointwise = c["template_pair_stack_config"], c["template_pointwise_attention_config"]
    evoformer, extra, structure = c["evoformer_stack_config"], c["extra_msa_stack_config"], c["structure_module_config"]
    shared = EvoformerConfig.model_fields
    return ModelConfig(
        c_m=evoformer["c_m"],
        c_z=evoformer["c_z"],
        c_s=evoformer["c_s"],
        c_t=template["c_t"],
        c_e=extra["c_e"],
        relpos_k=c["input_embedder_config"]["relpos_k"],
        template=TemplateConfig(
            num_blocks=template["num_blocks"],
            c_hidden_tri_att=template["c_hidden_tri_att"],
            num_heads_tri=template["num_heads_tri"],
            c_hidden_tri_mul=template["c_hidden_tri_mul"],
            transition_n=template["pair_transition_n"],
            dropout=template["dropout_rate"],
            c_hidden_pointwise=pointwise["c_hidden"],
            num_heads_pointwise=pointwise["num_heads"],
        ),
        extra_msa={key: value for key, value in extra.items() if key in shared},
        evoformer={key: value for key, value in evoformer.items() if key in shared},
        structure=StructureConfig(
            num_blocks=structure["num_blocks"],
            c_hidden_ipa=structure["c_hidden_ipa"],
            num_heads_ipa=structure["num_heads_ipa"],
            num_qk_points=structure["num_qk_points"],
            num_v_points=structure["num_v_points"],
            c_hidden_angle_resnet=structure["c_hidden_ang_res"],
            num_angle_resnet_blocks=structure["num_ang_res_blocks"],
            dropout=structure["dropout_rate"],
        ),
        heads=HeadsConfig(
            c_hidden_plddt=c["auxiliary_heads_config"]["per_residue_lddt_ca_predictor_config"]["c_hidden"]
        ),
    )


def small_model() -> AlphaFold:
    """The small model with the reference's weights, in evaluation mode (dropout off, as in the golden runs)."""
    model = AlphaFold(small_model_config())
    model.load_state_dict(load(locate("small_weights.npz")), strict=True)
    return model.eval()


def small_batch() -> dict[str, Tensor]:
    """The two-sample batch of three slices."""
    return canonical(load(locate("small_batch.npz")))


def canonical(reference_batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the reference's layout (every key repeated for each slice) to ours."""
    return {
        key: value if key in PER_SLICE_KEYS else value[..., 0].contiguous() for key, value in reference_batch.items()
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; 0 if both are zero everywhere."""
    difference = (value.detach().double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    return difference / scale if scale else difference
