"""Auxiliary heads (Supplement 1.9.6 to 1.9.10, Algorithm 29); always fp32."""

from functools import cache

import torch
from torch import Tensor, nn

from scalefold.config import ModelConfig
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model.layers import LayerNorm, Linear, relu_linear


class PerResidueLDDTHead(nn.Module):
    """Confidence bins per residue (Supplement Algorithm 29). s: [B, N, c_s] -> [B, N, bins]."""

    def __init__(self, c_s: int, c_hidden: int, num_bins: int) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(c_s)
        self.linear_1 = Linear(c_s, c_hidden, init="relu")
        self.linear_2 = Linear(c_hidden, c_hidden, init="relu")
        self.linear_3 = Linear(c_hidden, num_bins, init="final")

    def forward(self, s: Tensor) -> Tensor:
        """Logits."""
        return self.linear_3(relu_linear(self.linear_2, relu_linear(self.linear_1, self.layer_norm(s))))


class DistogramHead(nn.Module):
    """Symmetric distance bins (Supplement 1.9.8). z: [B, N, N, c_z] -> [B, N, N, bins]."""

    ops: Operations = REFERENCE

    def __init__(self, c_z: int, num_bins: int) -> None:
        super().__init__()
        self.linear = Linear(c_z, num_bins, init="final")

    def forward(self, z: Tensor) -> Tensor:
        """Logits."""
        return self.ops.linear_head(z, self.linear.weight, self.linear.bias, True)


class LinearHead(nn.Module):
    """One projection: masked MSA (Supplement 1.9.9) and experimentally resolved atoms (1.9.10)."""

    ops: Operations = REFERENCE

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear = Linear(c_in, c_out, init="final")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.ops.linear_head(x, self.linear.weight, self.linear.bias, False)


class AuxiliaryHeads(nn.Module):
    """All heads; inputs are taken to fp32 first, by the operation where a head is one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.heads
        self.plddt = PerResidueLDDTHead(config.c_s, h.c_hidden_plddt, h.num_plddt_bins)
        self.distogram = DistogramHead(config.c_z, h.num_distogram_bins)
        self.masked_msa = LinearHead(config.c_m, h.num_msa_classes)
        self.experimentally_resolved = LinearHead(config.c_s, h.num_atoms)

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits of all heads, and pLDDT in 0..100, from ``sm_single``, ``pair``, ``msa``, ``single``."""
        lddt_logits = self.plddt(outputs["sm_single"].float())
        return {
            "lddt_logits": lddt_logits,
            "plddt": plddt_from_logits(lddt_logits.detach()),
            "distogram_logits": self.distogram(outputs["pair"]),
            "masked_msa_logits": self.masked_msa(outputs["msa"]),
            "experimentally_resolved_logits": self.experimentally_resolved(outputs["single"]),
        }


def plddt_from_logits(logits: Tensor) -> Tensor:
    """Expected lDDT-Cα, 0..100. logits: [*, bins] -> [*]."""
    return (torch.softmax(logits, dim=-1) * _centres(logits.shape[-1], logits.device)).sum(-1)


@cache
def _centres(num_bins: int, device: torch.device) -> Tensor:
    """Of equal bins from 0 to 100."""
    return 100.0 * (torch.arange(num_bins, device=device) + 0.5) / num_bins
