"""The model, as the paper writes it: AlphaFold 2 (Jumper et al. 2021, Supplementary Information)."""

from scalefold.model.alphafold import (
    AlphaFold,
    Recycled,
    cast_trunk,
    is_fp32_parameter,
    select_slice,
)

__all__ = ["AlphaFold", "Recycled", "cast_trunk", "is_fp32_parameter", "select_slice"]
