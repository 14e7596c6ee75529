"""From a chain's record to the model's features: names, shapes, memory layout, and the steps that fill them.

A batch lies in one flat byte buffer, so that it crosses a process boundary, gets pinned and reaches the device in one
piece; the features are views of it. What differs between recycling slices is stored slice after slice and shown with
the slice as last dimension: ``feature[..., e]`` is contiguous, and the first slices are a prefix of the buffer.

Longer than 400 lines, because the schema of a batch, its memory layout and the steps that fill it belong together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from scalefold.config import FeatureConfig
from scalefold.data import residues
from scalefold.data.batch_keys import PER_SLICE_KEYS
from scalefold.data.features import structure
from scalefold.data.features.transforms import (
    NUM_MSA_CLASSES,
    Alignment,
    AlignmentSlice,
    Crop,
    MaskingRates,
    deletion_value,
    draw_clamped_fape,
    draw_crop,
    shuffle_first,
)
from scalefold.errors import DataError


class Template(Protocol):
    """One featurised template hit; arrays are aligned to the query's residues."""

    @property
    def name(self) -> str: ...
    @property
    def ok(self) -> bool: ...
    @property
    def sum_probs(self) -> float: ...
    @property
    def aatype(self) -> np.ndarray: ...  # uint8 [L], HHblits ids, gap 21
    @property
    def all_atom_positions(self) -> np.ndarray: ...  # float32 [L, 37, 3], angstrom
    @property
    def all_atom_mask(self) -> np.ndarray: ...  # bool [L, 37]


class Chain(Protocol):
    """What the pipeline needs to know of a chain (``store.ChainRecord`` has it)."""

    @property
    def chain_id(self) -> str: ...
    @property
    def aatype(self) -> np.ndarray: ...
    @property
    def all_atom_positions(self) -> np.ndarray: ...
    @property
    def all_atom_mask(self) -> np.ndarray: ...
    @property
    def resolution(self) -> float: ...
    @property
    def msa(self) -> np.ndarray: ...
    @property
    def deletion_matrix(self) -> np.ndarray: ...
    @property
    def msa_counts(self) -> np.ndarray: ...
    @property
    def templates(self) -> Sequence[Template]: ...


class FeatureSettings(FeatureConfig):
    """Everything the feature pipeline is told: what ``data`` configures, and what other places do.

    ``max_template_hits`` are featurised per sample; a training sample keeps a random part of them.
    """

    templates_enabled: bool = True
    max_template_hits: int = 4

    def padded_length(self, num_res: int) -> int:
        """Length of an evaluation batch: with few different ones nothing compiles on the clock."""
        return -(-num_res // self.eval_length_multiple) * self.eval_length_multiple

    @property
    def num_slices(self) -> int:
        """Passes through the model when all recycling iterations are used."""
        return self.num_recycling_iters + 1

    @property
    def masking(self) -> MaskingRates:
        """Rates of the alignment masking."""
        return MaskingRates(
            replace_fraction=self.masked_msa_replace_fraction,
            uniform_prob=self.masked_msa_uniform_prob,
            profile_prob=self.masked_msa_profile_prob,
            same_prob=self.masked_msa_same_prob,
        )


_F, _I = "float32", "int64"
#: key -> (dimensions without batch and slice, dtype); names stand for sizes of the sample (see ``BatchShape``)
FEATURE_SCHEMA: dict[str, tuple[tuple[int | str, ...], str]] = {
    "aatype": (("N_res",), _I),
    "residue_index": (("N_res",), _I),
    "seq_length": ((), _I),
    "seq_mask": (("N_res",), _F),
    "target_feat": (("N_res", 22), _F),
    "msa_feat": (("N_clust", "N_res", 49), _F),
    "msa_mask": (("N_clust", "N_res"), _F),
    "msa_row_mask": (("N_clust",), _F),
    "bert_mask": (("N_clust", "N_res"), _F),
    "true_msa": (("N_clust", "N_res"), _I),
    "extra_msa": (("N_extra", "N_res"), _I),
    "extra_has_deletion": (("N_extra", "N_res"), _F),
    "extra_deletion_value": (("N_extra", "N_res"), _F),
    "extra_msa_mask": (("N_extra", "N_res"), _F),
    "extra_msa_row_mask": (("N_extra",), _F),
    "template_aatype": (("N_templ", "N_res"), _I),
    "template_mask": (("N_templ",), _F),
    "template_sum_probs": (("N_templ", 1), _F),
    "template_all_atom_positions": (("N_templ", "N_res", 37, 3), _F),
    "template_all_atom_mask": (("N_templ", "N_res", 37), _F),
    "template_pseudo_beta": (("N_templ", "N_res", 3), _F),
    "template_pseudo_beta_mask": (("N_templ", "N_res"), _F),
    "template_torsion_angles_sin_cos": (("N_templ", "N_res", 7, 2), _F),
    "template_alt_torsion_angles_sin_cos": (("N_templ", "N_res", 7, 2), _F),
    "template_torsion_angles_mask": (("N_templ", "N_res", 7), _F),
    "all_atom_positions": (("N_res", 37, 3), _F),
    "all_atom_mask": (("N_res", 37), _F),
    "atom37_atom_exists": (("N_res", 37), _F),
    "residx_atom37_to_atom14": (("N_res", 37), _I),
    "residx_atom14_to_atom37": (("N_res", 14), _I),
    "atom14_atom_exists": (("N_res", 14), _F),
    "atom14_gt_exists": (("N_res", 14), _F),
    "atom14_alt_gt_exists": (("N_res", 14), _F),
    "atom14_atom_is_ambiguous": (("N_res", 14), _F),
    "atom14_gt_positions": (("N_res", 14, 3), _F),
    "atom14_alt_gt_positions": (("N_res", 14, 3), _F),
    "rigidgroups_gt_frames": (("N_res", 8, 4, 4), _F),
    "rigidgroups_alt_gt_frames": (("N_res", 8, 4, 4), _F),
    "rigidgroups_gt_exists": (("N_res", 8), _F),
    "rigidgroups_group_exists": (("N_res", 8), _F),
    "rigidgroups_group_is_ambiguous": (("N_res", 8), _F),
    "backbone_rigid_tensor": (("N_res", 4, 4), _F),
    "backbone_rigid_mask": (("N_res",), _F),
    "pseudo_beta": (("N_res", 3), _F),
    "pseudo_beta_mask": (("N_res",), _F),
    "chi_angles_sin_cos": (("N_res", 4, 2), _F),
    "chi_mask": (("N_res", 4), _F),
    "resolution": ((), _F),
    "is_distillation": ((), _F),
    "use_clamped_fape": ((), _F),
}


@dataclass(frozen=True)
class BatchShape:
    """Sizes that fix a batch's memory layout. Training samples have ``use_clamped_fape``, evaluation ones do not."""

    batch_size: int
    num_slices: int
    num_res: int
    num_clusters: int
    num_extra: int
    num_templates: int  # 0: no template features at all
    training: bool

    @staticmethod
    def of(
        settings: FeatureSettings, batch_size: int, num_slices: int, *, training: bool, num_res: int | None = None
    ) -> "BatchShape":
        """Shape of ``batch_size`` samples; ``num_res`` is the crop size unless the whole chain is used."""
        return BatchShape(
            batch_size=batch_size,
            num_slices=num_slices,
            num_res=num_res or settings.train_sequence_crop_size,
            num_clusters=settings.max_msa_clusters,
            num_extra=settings.max_extra_msa,
            num_templates=settings.max_templates if settings.templates_enabled else 0,
            training=training,
        )


@dataclass(frozen=True)
class _Entry:
    key: str
    offset: int  # from the start of its section
    shape: tuple[int, ...]  # [B, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Layout:
    """A section of what all slices share, then one section per slice: any first slices are one contiguous range."""

    common: tuple[_Entry, ...]
    common_bytes: int
    per_slice: tuple[_Entry, ...]
    slice_bytes: int


_ALIGNMENT_BYTES = 256


@lru_cache(maxsize=256)
def _layout(shape: BatchShape) -> _Layout:
    keys = [
        key
        for key in FEATURE_SCHEMA
        if (shape.num_templates or not key.startswith("template_")) and (shape.training or key != "use_clamped_fape")
    ]
    common = _section([key for key in keys if key not in PER_SLICE_KEYS], shape)
    return _Layout(*common, *_section([key for key in keys if key in PER_SLICE_KEYS], shape))


def _section(keys: Sequence[str], shape: BatchShape) -> tuple[tuple[_Entry, ...], int]:
    sizes = {
        "N_res": shape.num_res,
        "N_clust": shape.num_clusters,
        "N_extra": shape.num_extra,
        "N_templ": shape.num_templates,
    }
    entries, offset = [], 0
    for key in keys:
        dims, dtype = FEATURE_SCHEMA[key]
        entry = _Entry(key, offset, (shape.batch_size, *(sizes[d] if isinstance(d, str) else d for d in dims)), dtype)
        entries.append(entry)
        offset += -(-entry.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return tuple(entries), offset


def buffer_bytes(shape: BatchShape) -> int:
    """Size of the flat buffer that holds a batch of this shape. Fewer slices use a prefix of the same buffer."""
    layout = _layout(shape)
    return layout.common_bytes + shape.num_slices * layout.slice_bytes


def _stored_views(buffer: torch.Tensor, shape: BatchShape) -> dict[str, torch.Tensor]:
    """Views [B, ...] of what slices share and [R, B, ...] of what differs between them."""
    layout = _layout(shape)
    views = {
        e.key: buffer[e.offset : e.offset + e.num_bytes].view(getattr(torch, e.dtype)).view(e.shape)
        for e in layout.common
    }
    slices = buffer[layout.common_bytes : buffer_bytes(shape)].view(shape.num_slices, layout.slice_bytes)
    for e in layout.per_slice:
        part = slices[:, e.offset : e.offset + e.num_bytes].view(getattr(torch, e.dtype))
        views[e.key] = part.view(shape.num_slices, *e.shape)
    return {key: views[key] for key in FEATURE_SCHEMA if key in views}


def feature_views(buffer: torch.Tensor, shape: BatchShape) -> dict[str, torch.Tensor]:
    """The features [B, ...] ([B, ..., R] for ``PER_SLICE_KEYS``) of a flat uint8 ``buffer`` on any device."""
    views = _stored_views(buffer, shape)
    return {key: view.movedim(0, -1) if key in PER_SLICE_KEYS else view for key, view in views.items()}


def copy_samples(
    source: torch.Tensor, source_shape: BatchShape, first: int, target: torch.Tensor, target_shape: BatchShape
) -> None:
    """Samples ``first`` and following of one flat batch into the memory of another, as many as that one holds.

    In one piece where ``target`` holds all of them, else in one per feature, with few launches on a device. The target
    may have more slices: those stay as they are. Asynchronous on a device.
    """
    if source_shape.batch_size == target_shape.batch_size:
        count = buffer_bytes(source_shape)
        target[:count].copy_(source[:count], non_blocking=True)
        return
    rows = slice(first, first + target_shape.batch_size)
    targets, sources = _stored_views(target, target_shape), _stored_views(source, source_shape)
    pairs = []
    for key, values in sources.items():
        if key in PER_SLICE_KEYS:
            pairs += [(targets[key][e], values[e, rows]) for e in range(source_shape.num_slices)]
        else:
            pairs.append((targets[key], values[rows]))
    words = [(_words(to), _words(of)) for to, of in pairs]
    torch._foreach_copy_([to for to, _ in words], [of for _, of in words], non_blocking=True)


def _words(dense: torch.Tensor) -> torch.Tensor:
    """A dense tensor's memory as int32, so that features of all types share a launch."""
    return dense.view(-1).view(torch.int32)


def reference_layout(features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every feature with a trailing slice dimension, as the reference's batches have it."""
    num_slices = features["msa_feat"].shape[-1]
    return {
        key: value if key in PER_SLICE_KEYS else value.unsqueeze(-1).expand(*value.shape, num_slices)
        for key, value in features.items()
    }


def build_features(
    chain: Chain, settings: FeatureSettings, seed: int, *, training: bool, num_slices: int | None = None
) -> dict[str, torch.Tensor]:
    """Features of one chain with a batch dimension of 1.

    Training crops the chain to ``train_sequence_crop_size`` and draws templates; otherwise the whole chain is used and
    the best templates are kept. Only the first ``num_slices`` recycling slices are built (all of them by default).
    """
    shape = BatchShape.of(
        settings,
        1,
        num_slices or settings.num_slices,
        training=training,
        num_res=None if training else len(chain.aatype),
    )
    buffer = torch.zeros(buffer_bytes(shape), dtype=torch.uint8)
    fill_sample(buffer, shape, 0, chain, settings, seed)
    return feature_views(buffer, shape)


def fill_sample(
    buffer: torch.Tensor, shape: BatchShape, row: int, chain: Chain, settings: FeatureSettings, seed: int
) -> None:
    """Write one sample into place ``row`` of a zeroed batch buffer; what is not written is padding.

    Raises:
        DataError: the record's arrays contradict each other, or the chain does not fit ``shape``.
    """
    _check_record(chain)
    out = {
        key: (view[:, row] if key in PER_SLICE_KEYS else view[row]).numpy()
        for key, view in _stored_views(buffer, shape).items()
    }
    templates = select_templates(chain.templates, settings, seed, training=shape.training)
    crop = _crop(len(chain.aatype), len(templates), settings, seed, training=shape.training)
    if crop.stop - crop.start > shape.num_res:
        raise DataError(f"chain {chain.chain_id}: {crop.stop - crop.start} residues do not fit {shape.num_res}")
    _fill_sequence(out, chain, crop)
    _fill_structure(out, chain, crop)
    if shape.num_templates:
        _fill_templates(out, [templates[i] for i in crop.templates], crop)
    _fill_alignment(out, chain, crop, settings, seed)
    if shape.training:
        out["use_clamped_fape"][...] = draw_clamped_fape(settings.use_clamped_fape_probability, seed)


def _check_record(chain: Chain) -> None:
    length = len(chain.aatype)
    expected = {
        "all_atom_positions": (length, 37, 3),
        "all_atom_mask": (length, 37),
        "msa": (len(chain.msa), length),
        "deletion_matrix": (len(chain.msa), length),
        "msa_counts": (length, 22),
    }
    for name, shape in expected.items():
        found = getattr(chain, name).shape
        if found != shape:
            raise DataError(f"chain {chain.chain_id}: {name} has shape {found}, expected {shape}; prepare it again")
    if length == 0 or len(chain.msa) == 0:
        raise DataError(f"chain {chain.chain_id}: no residues or no alignment rows; prepare it again")


def select_templates(
    hits: Sequence[Template], settings: FeatureSettings, seed: int, *, training: bool
) -> list[Template]:
    """The hits that the sample may use: the first ones that featurise, in the order of the search or shuffled."""
    if not settings.templates_enabled or not settings.max_templates:
        return []
    order = shuffle_first(hits, settings.shuffle_top_k_prefiltered, seed) if training else hits
    return [hit for hit in order if hit.ok][: settings.max_template_hits]


def _crop(length: int, num_templates: int, settings: FeatureSettings, seed: int, *, training: bool) -> Crop:
    if training:
        return draw_crop(length, num_templates, settings.train_sequence_crop_size, settings.max_templates, seed)
    return Crop(0, length, tuple(range(min(num_templates, settings.max_templates))))


def _fill_sequence(out: dict[str, np.ndarray], chain: Chain, crop: Crop) -> None:
    size = crop.stop - crop.start
    aatype = chain.aatype[crop.start : crop.stop]
    out["aatype"][:size] = aatype
    out["residue_index"][:size] = np.arange(crop.start, crop.stop)
    out["seq_length"][...] = size
    out["seq_mask"][:size] = 1.0
    out["target_feat"][np.arange(size), 1 + aatype.astype(np.int64)] = 1.0  # channel 0: chain break, never
    out["resolution"][...] = chain.resolution


def _with_previous_residue(array: np.ndarray, crop: Crop, axis: int) -> np.ndarray:
    """The crop and one residue before it, if the chain has one: torsions look back."""
    before = min(crop.start, 1)
    return array[(slice(None),) * axis + (slice(crop.start - before, crop.stop),)]


def _fill_structure(out: dict[str, np.ndarray], chain: Chain, crop: Crop) -> None:
    size = crop.stop - crop.start
    aatype = _with_previous_residue(chain.aatype, crop, 0)
    positions = _with_previous_residue(chain.all_atom_positions, crop, 0)
    mask = _with_previous_residue(chain.all_atom_mask, crop, 0).astype(np.float32)
    torsions = structure.torsion_angles(aatype, positions, mask)
    aatype, positions, mask = aatype[-size:], positions[-size:], mask[-size:]
    beta, beta_mask = structure.pseudo_beta(aatype, positions, mask)
    features = {
        "all_atom_positions": positions,
        "all_atom_mask": mask,
        "pseudo_beta": beta,
        "pseudo_beta_mask": beta_mask,
        "chi_angles_sin_cos": torsions["sin_cos"][-size:, 3:],
        "chi_mask": torsions["mask"][-size:, 3:],
        **structure.atom14_features(aatype, positions, mask),
        **structure.rigid_group_features(aatype, positions, mask),
    }
    for key, value in features.items():
        out[key][:size] = value


def _fill_templates(out: dict[str, np.ndarray], templates: Sequence[Template], crop: Crop) -> None:
    if not templates:
        return
    size, count = crop.stop - crop.start, len(templates)
    hhblits = np.stack([_with_previous_residue(t.aatype, crop, 0) for t in templates])
    aatype = residues.HHBLITS_TO_RESTYPE[hhblits]
    positions = np.stack([_with_previous_residue(t.all_atom_positions, crop, 0) for t in templates])
    mask = np.stack([_with_previous_residue(t.all_atom_mask, crop, 0) for t in templates]).astype(np.float32)
    torsions = structure.torsion_angles(aatype, positions, mask)
    beta, beta_mask = structure.pseudo_beta(aatype, positions, mask)
    features = {
        "template_aatype": aatype,
        "template_all_atom_positions": positions,
        "template_all_atom_mask": mask,
        "template_pseudo_beta": beta,
        "template_pseudo_beta_mask": beta_mask,
        "template_torsion_angles_sin_cos": torsions["sin_cos"],
        "template_alt_torsion_angles_sin_cos": torsions["alt_sin_cos"],
        "template_torsion_angles_mask": torsions["mask"],
    }
    for key, value in features.items():
        out[key][:count, :size] = value[:, -size:]
    out["template_mask"][:count] = 1.0
    out["template_sum_probs"][:count, 0] = [t.sum_probs for t in templates]


def _fill_alignment(out: dict[str, np.ndarray], chain: Chain, crop: Crop, settings: FeatureSettings, seed: int) -> None:
    alignment = Alignment(chain.msa, chain.deletion_matrix, chain.msa_counts, crop)
    rates, size = settings.masking, crop.stop - crop.start
    clusters = min(len(chain.msa), settings.max_msa_clusters)
    extra = min(len(chain.msa) - clusters, settings.max_extra_msa)
    out["msa_mask"][:clusters, :size] = 1.0
    out["msa_row_mask"][:clusters] = 1.0
    out["extra_msa_mask"][:extra, :size] = 1.0
    out["extra_msa_row_mask"][:extra] = 1.0
    for e in range(len(out["msa_feat"])):
        drawn = alignment.draw_slice(settings.max_msa_clusters, settings.max_extra_msa, rates, seed + e)
        _fill_slice({key: out[key][e] for key in PER_SLICE_KEYS}, drawn)


def _fill_slice(out: dict[str, np.ndarray], drawn: AlignmentSlice) -> None:
    clusters, size = drawn.masked.shape
    feat = out["msa_feat"][:clusters, :size]
    feat[np.arange(clusters)[:, None], np.arange(size), drawn.masked] = 1.0
    feat[..., NUM_MSA_CLASSES] = drawn.deletions > 0
    feat[..., NUM_MSA_CLASSES + 1] = deletion_value(drawn.deletions)
    feat[..., NUM_MSA_CLASSES + 2 : 2 * NUM_MSA_CLASSES + 2] = drawn.cluster_profile
    feat[..., 2 * NUM_MSA_CLASSES + 2] = deletion_value(drawn.cluster_deletion_mean)
    out["true_msa"][:clusters, :size] = drawn.original
    out["bert_mask"][:clusters, :size] = drawn.was_masked
    extra = len(drawn.extra)
    out["extra_msa"][:extra, :size] = drawn.extra
    out["extra_has_deletion"][:extra, :size] = drawn.extra_deletions > 0
    out["extra_deletion_value"][:extra, :size] = deletion_value(drawn.extra_deletions)
