"""Random chains with the features that can go wrong: gaps, X, missing atoms, deletions, failing templates."""

from types import SimpleNamespace

import numpy as np

from scalefold.data import residues
from scalefold.data.store.store import ChainRecord, count_letters


def random_chain(length, num_rows, seed=0, num_templates=3, failing=()):
    """A chain of ``length`` residues with an alignment of related rows; ``failing`` template numbers are not ok."""
    rng = np.random.default_rng(seed)
    aatype = rng.integers(0, 21, length).astype(np.uint8)
    mask = residues.ATOM37_MASK[aatype].astype(bool) & (rng.random((length, 37)) < 0.95)
    positions = (rng.normal(0, 10, (length, 37, 3)) * mask[..., None]).astype(np.float32)
    query = residues.RESTYPE_TO_HHBLITS[aatype]
    msa = np.where(rng.random((num_rows, length)) < 0.5, query, rng.integers(0, 22, (num_rows, length)))
    msa = msa.astype(np.uint8)
    msa[0] = query
    deletions = np.where(rng.random(msa.shape) < 0.05, rng.integers(1, 200, msa.shape), 0).astype(np.uint8)
    return ChainRecord(
        chain_id=f"{seed:04d}_A",
        sequence=residues.aatype_to_sequence(aatype),
        aatype=aatype,
        all_atom_positions=positions,
        all_atom_mask=mask,
        resolution=2.0,
        release_date="2000-01-01",
        msa=msa,
        deletion_matrix=deletions,
        templates=[_template(length, rng, i, i not in failing) for i in range(num_templates)],
        msa_counts=count_letters(msa),
    )


def _template(length, rng, number, ok):
    aatype = rng.integers(0, 22, length).astype(np.uint8)
    restype = np.minimum(residues.HHBLITS_TO_RESTYPE[aatype], 20)
    mask = residues.ATOM37_MASK[restype].astype(bool) & (aatype != 21)[:, None]
    positions = (rng.normal(0, 10, (length, 37, 3)) * mask[..., None]).astype(np.float32)
    return SimpleNamespace(
        name=f"t{number}", ok=ok, sum_probs=100.0 - number, aatype=aatype, all_atom_positions=positions,
        all_atom_mask=mask,
    )  # fmt: skip
