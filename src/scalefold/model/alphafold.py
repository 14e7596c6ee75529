"""The whole model (Supplement Algorithm 2) with recycling."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalefold.config import ModelConfig
from scalefold.data.batch_keys import PER_SLICE_KEYS
from scalefold.model.embedders import RECYCLING_EDGES, ExtraMSAEmbedder, InputEmbedder, RecyclingEmbedder
from scalefold.model.evoformer import EvoformerStack, ExtraMSAStack
from scalefold.model.heads import AuxiliaryHeads
from scalefold.model.layers import affine, initialise
from scalefold.model.rigid import pseudo_beta
from scalefold.model.structure import StructureModule
from scalefold.model.templates import (
    PSI,
    TemplateAngleEmbedder,
    TemplatePairEmbedder,
    TemplatePairStack,
    TemplatePointwiseAttention,
    template_angle_features,
)

FP32_PREFIXES = ("structure_module.", "auxiliary_heads.")

Features = dict[str, Tensor]


class Recycled(NamedTuple):
    """What a pass hands to the next one."""

    m0: Tensor  # [B, N, c_m], first row of the MSA representation, trunk type
    z: Tensor  # [B, N, N, c_z], trunk type
    x: Tensor  # [B, N, 37, 3], angstrom, fp32


class Templates(NamedTuple):
    """What the passes take from the templates: nothing recycled enters."""

    t: Tensor  # [B, T, N, N, c_t], behind the pair stack, trunk type
    angles: Tensor  # [B, T, N, c_m], rows of the MSA representation, trunk type


def select_slice(batch: Mapping[str, Tensor], index: int) -> Features:
    """Features of one recycling pass: per-pass keys lose their trailing dimension, all others stay."""
    return {key: value[..., index] if key in PER_SLICE_KEYS else value for key, value in batch.items()}


def is_fp32_parameter(name: str) -> bool:
    """True for the parameters that stay fp32 whatever the compute type: structure module and heads."""
    return name.startswith(FP32_PREFIXES)


def cast_trunk(model: nn.Module, dtype: torch.dtype) -> None:
    """Let everything except the structure module and the heads store weights and activations in ``dtype``."""
    for name, parameter in model.named_parameters():
        if not is_fp32_parameter(name):
            parameter.data = parameter.data.to(dtype)


class AlphaFold(nn.Module):
    """AlphaFold 2, initial-training configuration of the benchmark at the default sizes.

    Parameter names, shapes and order are those of the benchmark's checkpoint. The type of the trunk's weights decides
    the type in which it computes; coordinates, distances, masks, the structure module and the heads are fp32.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        c = config
        self.templates_enabled = c.templates_enabled
        self.input_embedder = InputEmbedder(c.c_m, c.c_z, c.relpos_k)
        self.recycling_embedder = RecyclingEmbedder(c.c_m, c.c_z)
        if c.templates_enabled:
            self.template_angle_embedder = TemplateAngleEmbedder(c.c_m)
            self.template_pair_embedder = TemplatePairEmbedder(c.c_t)
            self.template_pair_stack = TemplatePairStack(c.c_t, c.template)
            self.template_pointwise_attention = TemplatePointwiseAttention(c.c_z, c.c_t, c.template)
        self.extra_msa_embedder = ExtraMSAEmbedder(c.c_e)
        self.extra_msa_stack = ExtraMSAStack(c.c_e, c.c_z, c.extra_msa)
        self.evoformer_stack = EvoformerStack(c.c_m, c.c_z, c.c_s, c.evoformer)
        self.structure_module = StructureModule(c)
        self.auxiliary_heads = AuxiliaryHeads(c)
        initialise(self, seed)

    @property
    def checkpoint_blocks(self) -> bool:
        """Whether blocks recompute their activations in the backward instead of keeping them."""
        return self.evoformer_stack.checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, recompute: bool) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "checkpoint_blocks"):
                module.checkpoint_blocks = recompute  # type: ignore[assignment]

    def forward(self, batch: Mapping[str, Tensor], num_passes: int | None = None) -> dict[str, Tensor]:
        """All outputs of the last of ``num_passes`` passes (None: as many as the batch has slices).

        batch: features with leading dimension B, fp32 or int64; ``PER_SLICE_KEYS`` have a trailing dimension R.
        Only the last pass has gradients. Dropout, in training mode, is active in all of them.
        """
        outputs = self.predict(batch, num_passes)
        return outputs | self.auxiliary_heads(outputs)

    def predict(self, batch: Mapping[str, Tensor], num_passes: int | None = None) -> dict[str, Tensor]:
        """The outputs of ``forward`` without those of the heads, which no other output depends on.

        Templates differ between passes by dropout alone: without it all passes take what is computed once.
        """
        last = (num_passes or batch["msa_feat"].shape[-1]) - 1
        recycled = self.nothing_recycled(batch)
        templates = None if self.training else self.read_templates(batch, pair_mask_of(batch))
        with torch.no_grad():
            for index in range(last):
                recycled = self.iteration(select_slice(batch, index), recycled, templates)[1]
        return self.iteration(select_slice(batch, last), recycled, templates)[0]

    def nothing_recycled(self, batch: Mapping[str, Tensor]) -> Recycled:
        """Zeros in place of a previous pass."""
        weight = self.input_embedder.linear_tf_m.weight
        num_samples, num_residues = batch["aatype"].shape[:2]
        c_m, c_z = weight.shape[0], self.input_embedder.linear_relpos.weight.shape[0]
        return Recycled(
            m0=weight.new_zeros((num_samples, num_residues, c_m)),
            z=weight.new_zeros((num_samples, num_residues, num_residues, c_z)),
            x=torch.zeros((num_samples, num_residues, 37, 3), device=weight.device),
        )

    def iteration(
        self, features: Features, recycled: Recycled, templates: Templates | None = None
    ) -> tuple[dict[str, Tensor], Recycled]:
        """One pass over the features of one slice (see ``select_slice``), without heads; templates: see ``embed``."""
        num_clusters = features["msa_feat"].shape[1]
        m, z, msa_mask, pair_mask = self.embed(features, recycled, templates)
        m, z, s = self.evoformer_stack(m, z, msa_mask, pair_mask)
        structure = self.structure_module(s, z, features["seq_mask"], features["aatype"])
        outputs = {"msa": m[:, :num_clusters], "pair": z, "single": s, **structure._asdict()}
        positions = atom14_to_atom37(structure.sm_positions[:, -1], features)
        outputs["final_atom_positions"] = positions
        outputs["final_atom_mask"] = features["atom37_atom_exists"]
        outputs["final_affine_tensor"] = structure.sm_frames[:, -1]
        return outputs, Recycled(m[:, 0].detach(), z.detach(), positions.detach())

    def embed(
        self, features: Features, recycled: Recycled, templates: Templates | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Everything before the Evoformer: m [B, S, N, c_m], z, msa_mask [B, S, N], pair_mask [B, N, N].

        templates: what ``read_templates`` has given for this sample; None reads them here, if there are any.
        """
        pair_mask = pair_mask_of(features)
        m, z = self.embed_sample(features, recycled)
        msa_mask = features["msa_mask"]
        templates = templates or self.read_templates(features, pair_mask)
        if templates is not None:
            z = self.add_templates(z, templates.t, features["template_mask"])
            m = torch.cat((m, templates.angles), dim=1)
            msa_mask = torch.cat((msa_mask, features["template_torsion_angles_mask"][..., PSI]), dim=1)
        a = self.embed_extra_msa(features)
        z = self.extra_msa_stack(a, z, features["extra_msa_mask"], pair_mask)
        return m, z, msa_mask, pair_mask

    def embed_sample(self, features: Features, recycled: Recycled) -> tuple[Tensor, Tensor]:
        """m [B, S, N, c_m] and z [B, N, N, c_z] from target, clustered MSA and the previous pass."""
        m, z = self._letters_at_once(features, recycled), self._pairs_at_once(features, recycled)
        if m is not None and z is not None:
            return m, z
        m, z = self.input_embedder(features["target_feat"], features["residue_index"], features["msa_feat"])
        x_prev = pseudo_beta(features["aatype"], recycled.x)
        m0_update, z_update = self.recycling_embedder(recycled.m0, recycled.z, x_prev)
        return torch.cat((m[:, :1] + m0_update[:, None], m[:, 1:]), dim=1), z + z_update

    def _letters_at_once(self, features: Features, recycled: Recycled) -> Tensor | None:
        """The m of ``embed_sample`` in one operation, where there is one."""
        inputs, (norm,) = self.input_embedder, affine(self.recycling_embedder.layer_norm_m)
        linears = affine(inputs.linear_msa_m, inputs.linear_tf_m)
        given = (features["msa_feat"], features["target_feat"], recycled.m0)
        return inputs.ops.embed_letters(*given, norm=norm, linears=linears)

    def _pairs_at_once(self, features: Features, recycled: Recycled) -> Tensor | None:
        """The z of ``embed_sample`` in one operation, where there is one."""
        inputs, recycling = self.input_embedder, self.recycling_embedder
        linears = affine(inputs.linear_tf_z_i, inputs.linear_tf_z_j, inputs.linear_relpos, recycling.linear)
        given = (features["target_feat"], features["residue_index"], features["aatype"], (recycled.z, recycled.x))
        (norm,) = affine(recycling.layer_norm_z)
        return inputs.ops.embed_pairs(*given, inputs.relpos_k, RECYCLING_EDGES, norm=norm, linears=linears)

    def read_templates(self, features: Mapping[str, Tensor], pair_mask: Tensor) -> Templates | None:
        """The templates through their pair stack; None for a model or a sample without any."""
        if not (self.templates_enabled and features["template_mask"].shape[1]):
            return None
        t, angles = self.embed_templates(features)
        return Templates(self.template_pair_stack(t, pair_mask), angles)

    def embed_templates(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pair representation [B, T, N, N, c_t] and rows of the MSA representation [B, T, N, c_m] of all templates."""
        t = self.template_pair_embedder(features)
        return t, self.template_angle_embedder(template_angle_features(features))

    def add_templates(self, z: Tensor, t: Tensor, template_mask: Tensor) -> Tensor:
        """z plus what it attends to in t, [B, N, N, c_z]; z itself for samples without any template."""
        return self.template_pointwise_attention.added(t, z, template_mask)

    def embed_extra_msa(self, features: Features) -> Tensor:
        """Representation of the extra sequences, [B, S_extra, N, c_e]."""
        return self.extra_msa_embedder(features)


def pair_mask_of(features: Mapping[str, Tensor]) -> Tensor:
    """1 where both residues exist, [B, N, N], fp32."""
    seq_mask = features["seq_mask"]
    return seq_mask[:, :, None] * seq_mask[:, None, :]


def atom14_to_atom37(atom14: Tensor, features: Features) -> Tensor:
    """[B, N, 14, 3] -> [B, N, 37, 3], zero where the residue type has no such atom."""
    index = features["residx_atom37_to_atom14"][..., None].expand(-1, -1, -1, 3)
    return torch.gather(atom14, 2, index) * features["atom37_atom_exists"][..., None]
