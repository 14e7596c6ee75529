"""Synthetic raw files have the public layout and prepare without a rejection."""

from pathlib import Path

from scalefold.data.made.synthetic_raw import SyntheticRaw, write_raw
from scalefold.data.store import prepare
from scalefold.data.store.store import Store

SMALL = SyntheticRaw(num_chains=30, median_length=40, median_rows=20, num_hits=6, chains_per_family=6)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_settings_give_equal_files(tmp_path):
    """The generator is a function of its settings."""
    write_raw(tmp_path / "a", SMALL)
    write_raw(tmp_path / "b", SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_every_synthetic_chain_is_accepted_with_alignment_and_templates(tmp_path):
    """All chains, all alignments; some hits pass the pre-filter and can be used."""
    summary = prepare.prepare(write_raw(tmp_path / "raw", SMALL), tmp_path / "store", report=lambda _: None)
    store = Store(tmp_path / "store")
    assert (summary.num_chains, summary.num_rejected, summary.num_notes) == (30, 0, 0)
    assert store.table.has_alignment.all()
    assert (store.table.cluster_id >= 0).all()
    records = [store.read(chain) for chain in store.chain_ids]
    assert all(record.msa.shape[1] == len(record.sequence) for record in records)
    assert any(record.deletion_matrix.any() for record in records)
    usable = [template for record in records for template in record.templates if template.ok]
    assert usable
    assert usable[0].all_atom_mask.any()
