"""Fake batches with true shapes: helices joined by loops with side chains, and an alignment of random relatives.

For warm-up before the clock starts, for benchmarks and for tests; no data set is involved. Bond lengths, masks and
residue types are real enough that every loss term is finite and of its usual size.
"""

import numpy as np
import torch

from scalefold.data import residues
from scalefold.data.features.features import BatchShape, FeatureSettings, buffer_bytes, fill_sample
from scalefold.data.loading.loader import Batch, to_device
from scalefold.data.made import demo_geometry
from scalefold.data.store.store import ChainRecord, TemplateHit, count_letters

_HELIX_DEG, _HELIX_RESIDUES, _LOOP_RESIDUES = (-57.0, -47.0), 14, 4


def synthetic_chain(num_res: int, num_rows: int, num_templates: int = 0, seed: int = 0) -> ChainRecord:
    """A chain of every amino acid with all its atoms; templates have its own structure.

    Alignment rows share 40 to 100 % of the query's residues; one position in fifty has deletions.
    """
    rng = np.random.default_rng(seed)
    aatype = rng.integers(0, 20, num_res, dtype=np.uint8)
    positions, mask = _atoms(aatype, rng), residues.ATOM37_MASK[aatype].astype(bool)
    msa = _related_rows(residues.RESTYPE_TO_HHBLITS[aatype], num_rows, rng)
    has_deletion = rng.integers(0, 50, msa.shape, dtype=np.uint8) == 0
    same = np.arange(num_res, dtype=np.int32)
    return ChainRecord(
        chain_id=f"synthetic{seed}",
        sequence=residues.aatype_to_sequence(aatype),
        aatype=aatype,
        all_atom_positions=positions,
        all_atom_mask=mask,
        resolution=2.0,
        release_date="2000-01-01",
        msa=msa,
        deletion_matrix=np.where(has_deletion, rng.integers(1, 9, msa.shape, dtype=np.uint8), np.uint8(0)),
        templates=[
            TemplateHit(f"template{i}", 100.0 - i, True, "", same, None, lambda: (aatype, positions, mask))
            for i in range(num_templates)
        ],
        msa_counts=count_letters(msa),
    )


def _related_rows(query: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    identity = rng.uniform(0.4, 1.0, (num_rows, 1)).astype(np.float32)
    identity[0] = 1.0
    shape = (num_rows, len(query))
    kept = rng.random(shape, dtype=np.float32) < identity
    return np.where(kept, query, rng.integers(0, 22, shape, dtype=np.uint8))


def _atoms(aatype: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [L, 37, 3] angstrom, 0 where the residue type has no such atom."""
    length = len(aatype)
    in_loop = np.arange(length) % (_HELIX_RESIDUES + _LOOP_RESIDUES) >= _HELIX_RESIDUES
    loop = np.stack([rng.uniform(-120, -60, length), rng.uniform(100, 160, length)], axis=1)
    phi_psi = np.where(in_loop[:, None], loop, np.array(_HELIX_DEG))
    trace = demo_geometry.backbone(phi_psi)
    atom14 = demo_geometry.rotamer_atoms(residues.aatype_to_sequence(aatype), trace, phi_psi[:, 1])[:, 0]
    atom14[:, :3] = trace
    positions = np.take_along_axis(atom14, residues.ATOM37_TO_ATOM14[aatype][..., None], axis=1)
    return np.where(residues.ATOM37_MASK[aatype][..., None] > 0, positions, 0.0).astype(np.float32)


def synthetic_batch(
    settings: FeatureSettings,
    batch_size: int = 1,
    num_passes: int | None = None,
    *,
    seed: int = 0,
    training: bool = True,
    num_res: int | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """A batch as the loader delivers it, of generated chains.

    Every alignment fills the cluster and extra rows and every template place is filled (the draw decides how many a
    training sample keeps). ``num_res`` is the length of an evaluation chain (``training=False``); the default is the
    crop size, which training always has.
    """
    shape = BatchShape.of(
        settings,
        batch_size,
        num_passes or settings.num_slices,
        training=training,
        num_res=None if training else num_res,
    )
    buffer = torch.zeros(buffer_bytes(shape), dtype=torch.uint8)
    num_rows = settings.max_msa_clusters + settings.max_extra_msa
    seeds = tuple(range(seed, seed + batch_size))
    for row, sample_seed in enumerate(seeds):
        chain = synthetic_chain(shape.num_res, num_rows, settings.max_templates, sample_seed)
        fill_sample(buffer, shape, row, chain, settings, sample_seed)
    names, rows = tuple(f"synthetic{s}" for s in seeds), tuple(range(batch_size))
    return to_device(Batch(buffer, shape, 0, names, rows, seeds, (0.0,) * batch_size), device)
