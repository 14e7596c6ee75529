"""Raw folders to a store: bad files are listed and the rest goes on; a killed run continues; nothing is done twice.

Longer than 400 lines, because it has one test per way in which raw files can be wrong.
"""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raw_files import CifEntry, Entity, a3m, backbone, hhr, peptide, write
from scalefold.data.raw import rawlayout
from scalefold.data.raw.rawlayout import RawLayout
from scalefold.data.store import labels, prepare, selection, structures, units
from scalefold.data.store.alignments import prepare_alignments
from scalefold.data.store.manifest import read_manifest, read_rejections, verify_data
from scalefold.data.store.store import Store
from scalefold.data.store.structures import prepare_structures
from scalefold.errors import DataError

MONOMERS = ("ALA", "GLY", "SER", "MET", "LYS", "TRP", "ASP", "GLU", "PHE", "ILE", "LEU", "VAL")
SEQUENCE = "AGSMKWDEFILV"


def quiet(_: str) -> None:
    """Reports nothing."""


def cif(folder, pdb_id, **changes):
    entry = peptide(MONOMERS, pdb_id=pdb_id.upper(), **changes)
    return write(folder / pdb_id[1:3] / f"{pdb_id}.cif", entry.text())


def raw_folder(root: Path) -> RawLayout:
    """Two good entries, one of which has an alignment and the other as template; clusters and obsolete list."""
    cif(root / "mmcif", "1aaa", dates=("2010-01-01",))
    cif(root / "mmcif", "1bbb", dates=("2000-01-01",))
    write(root / "aligned" / "pdb" / "1aaa_A" / "a3m" / "uniref90_hits.a3m", a3m(SEQUENCE, "AGSMKWDEFIL-", SEQUENCE))
    text = hhr([("1BBB_A", SEQUENCE[:-1], SEQUENCE[:-1], 9.0), ("1ZZZ_A", SEQUENCE, SEQUENCE, 8.0)])
    write(root / "aligned" / "pdb" / "1aaa_A" / "hhr" / "pdb70_hits.hhr", text)
    write(root / "aligned" / "duplicate_pdb_chains.txt", "1aaa_A 9zzz_A\n")
    write(root / "clusters.txt", "9ZZZ_1\n1AAA_1 1BBB_1\n")
    write(root / "obsolete.dat", "OBSLTE    31-JUL-94 2ABC     3XYZ\n")
    return RawLayout(root / "mmcif", (root / "aligned",), root / "clusters.txt", root / "obsolete.dat")


def reasons(store_dir):
    return {r.name: r.reason for r in read_rejections(store_dir)}


def contents(store_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store_dir)): p.read_bytes() for p in sorted(store_dir.rglob("*")) if p.is_file()}


def test_raw_files_become_a_store(tmp_path):
    """Chains in the order of the files, their alignment and its usable template."""
    summary = prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=quiet)
    assert (summary.num_chains, summary.num_alignments, summary.num_rejected) == (2, 1, 0)
    store = Store(tmp_path / "store")
    assert store.chain_ids == ["1aaa_A", "1bbb_A"]
    assert store.table.has_alignment.tolist() == [True, False]
    assert store.table.cluster_id.tolist() == [1, 1]
    record = store.read("1aaa_A")
    assert record.sequence == SEQUENCE
    assert record.msa.shape == (2, 12)
    assert [(t.name, t.ok) for t in record.templates] == [("1bbb_A", True)]
    assert record.templates[0].all_atom_mask.sum() == 4 * 11
    assert not (tmp_path / "store" / "work").exists()


def test_the_second_run_does_nothing(tmp_path):
    """And says so; not one file is touched."""
    layout = raw_folder(tmp_path)
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    lines: list[str] = []
    summary = prepare.prepare(layout, tmp_path / "store", report=lines.append)
    assert summary.already_done
    assert summary.units_done == 0
    assert "nothing to do" in lines[-1]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}


def test_a_store_of_other_raw_files_is_not_touched(tmp_path):
    """A new entry means another store, finished or not."""
    layout = raw_folder(tmp_path)
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    write(tmp_path / "other" / "work" / "plan.json", json.dumps({"fingerprint": "x", "settings": {}}))
    with pytest.raises(DataError, match="unfinished store of other raw files"):
        prepare.prepare(layout, tmp_path / "other", report=quiet)
    write(tmp_path / "other" / "work" / "plan.json", "{")
    with pytest.raises(DataError, match=r"plan\.json: cannot be read"):
        prepare.prepare(layout, tmp_path / "other", report=quiet)
    cif(tmp_path / "mmcif", "1ccc")
    with pytest.raises(DataError, match="holds a store of other raw files"):
        prepare.prepare(layout, tmp_path / "store", report=quiet)


def test_content_does_not_depend_on_workers_or_ranks(tmp_path, monkeypatch):
    """One process, two processes, and two ranks that take turns give the same bytes."""
    monkeypatch.setattr(rawlayout, "_MIN_UNIT_BYTES", 1)
    layout = raw_folder(tmp_path)
    prepare.prepare(layout, tmp_path / "one", report=quiet)
    prepare.prepare(layout, tmp_path / "two", num_workers=2, report=quiet)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    _prepare_as_two_ranks(layout, tmp_path / "ranks")
    assert contents(tmp_path / "one") == contents(tmp_path / "ranks")


def _prepare_as_two_ranks(layout, out_dir):
    """Rank 1 runs its share whenever rank 0 waits, as a barrier would have it."""
    plan = rawlayout.scan(layout)
    job = units.Job(out_dir, layout, plan, labels.read_inputs(layout, plan, quiet), True)

    def share(phase, work, members):
        return lambda: units.run_units(phase, work, job, members, 1, units.Team(1, 2), quiet)

    structures = share("structures", prepare_structures, plan.structures)
    alignments = share("alignments", prepare_alignments, plan.alignments)
    waits = iter([structures, lambda: None, alignments, lambda: None, lambda: None])
    prepare.prepare(layout, out_dir, team=units.Team(0, 2, lambda: next(waits)()), report=quiet)


def test_a_killed_run_continues_with_identical_content(tmp_path, monkeypatch):
    """SIGKILL in the middle: finished units stay, the result equals an undisturbed run."""
    monkeypatch.setattr(rawlayout, "_MIN_UNIT_BYTES", 1)
    layout = raw_folder(tmp_path)
    for number in range(40):
        cif(tmp_path / "mmcif", f"2x{number:02d}")
    prepare.prepare(layout, tmp_path / "whole", report=quiet)
    script = (
        "import sys, time; from pathlib import Path\n"
        "from scalefold.data.raw import rawlayout\n"
        "from scalefold.data.store import prepare, units\n"
        "rawlayout._MIN_UNIT_BYTES = 1; root = Path(sys.argv[1])\n"
        "slow = units.run_unit\n"
        "units.run_unit = lambda *a: (time.sleep(0.05), slow(*a))[1]\n"
        "files = root / 'clusters.txt', root / 'obsolete.dat'\n"
        "layout = rawlayout.RawLayout(root / 'mmcif', (root / 'aligned',), *files)\n"
        "prepare.prepare(layout, root / 'killed')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.DEVNULL)
    work = tmp_path / "killed" / "work"
    deadline = time.monotonic() + 60
    while len(list(work.glob("structures-*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    summary = prepare.prepare(layout, tmp_path / "killed", report=quiet)
    assert summary.units_found >= 5
    assert summary.units_done > 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def _many_bad_structures(root: Path) -> dict[str, str]:
    """Bad structure files beside the good ones, and what each is to be refused or noted for."""
    folder, good = root / "mmcif", peptide(MONOMERS)
    text = good.text()
    write(folder / "2cut.cif", text[: len(text) // 2])
    write(folder / "2gzi.cif.gz", gzip.compress(text.encode())[:-9])
    write(folder / "2emp.cif", "")
    write(folder / "2rna.cif", replace(good, entities=[replace(good.entities[0], linking="RNA linking")]).text())
    write(folder / "2dup.cif", replace(good, atoms=[*good.atoms, good.atoms[0]]).text())
    no_ca = [a for a in good.atoms if a.name != "CA"]
    write(folder / "2noc.cif", replace(good, pdb_id="2NOC", atoms=no_ca).text())
    several = CifEntry(
        [Entity([(1, "ALA"), (1, "SER")])],
        [*backbone(1, "ALA", altloc="A"), *backbone(1, "SER", altloc="B")],
        pdb_id="2HET",
    )
    write(folder / "2het.cif", several.text())
    return {
        "2cut": "not valid mmCIF",
        "2gzi": "cannot be read",
        "2emp": "file is empty",
        "2rna": "no polymer has a peptide monomer",
        "2dup": "given twice",
        "2noc_A": "no C-alpha atom",
        "2het_A": "1 extra letters from positions with several monomers",
    }


def test_bad_structures_are_listed_and_the_rest_goes_on(tmp_path):
    """One line per file with its reason; two of them are kept with a note."""
    expected = _many_bad_structures(tmp_path)
    prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=quiet)
    found = reasons(tmp_path / "store")
    for name, reason in expected.items():
        assert reason in found[name], name
    assert set(found) == set(expected)
    assert Store(tmp_path / "store").chain_ids == ["1aaa_A", "1bbb_A", "2het_A", "2noc_A"]


BAD_ALIGNMENTS = {
    "ragged row": ("uniref90_hits.a3m", a3m(SEQUENCE, "AGS"), "row 2 has 3 aligned letters, the first row has 12"),
    "wrong letter": ("uniref90_hits.a3m", a3m(SEQUENCE, "AGSMKWDEFIL*"), "contains '*'"),
    "no rows": ("uniref90_hits.a3m", "\n", "holds no sequence"),
    "other length": ("uniref90_hits.a3m", a3m("AGSMKWDEFILVA"), "chain has 12 residues, its alignment 13 columns"),
    "cut gzip": ("uniref90_hits.a3m.gz", gzip.compress(a3m(SEQUENCE).encode())[:-8], "cannot be read"),
    "unknown name": ("bfd_uniref_hits.a3m", a3m(SEQUENCE), "no alignment of a known name: found bfd_uniref_hits.a3m"),
    "unknown packing": (
        "uniref90_hits.a3m.zst",
        b"x",
        "found uniref90_hits.a3m.zst; names that are read: uniref90_hits",
    ),
    "wrong tool": ("hmm_output.sto", "x", "found hmm_output.sto"),
}


@pytest.mark.parametrize("name", BAD_ALIGNMENTS)
def test_a_bad_alignment_costs_only_itself(tmp_path, name):
    """Its chain stays as a template and counts as one without alignment; the line names folder, file and reason."""
    layout = raw_folder(tmp_path)
    file, text, reason = BAD_ALIGNMENTS[name]
    write(tmp_path / "aligned" / "pdb" / "1bbb_A" / file, text)
    with (tmp_path / "aligned" / "duplicate_pdb_chains.txt").open("a") as clusters:
        clusters.write("1bbb_A\n")
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    assert reason in reasons(tmp_path / "store")["1bbb_A"]
    assert Store(tmp_path / "store").table.has_alignment.tolist() == [True, False]


HITS = hhr([("1BBB_A", SEQUENCE[:-1], SEQUENCE[:-1], 9.0)])
HIT_FILES = {
    "zero bytes": ("", [], None),
    "no hit": ("Query         1aaa_A\n\n No Hit\n\nDone!\n", [], None),
    "cut": (HITS + "No 2\n>1BBB_A\n", ["1bbb_A"], "1 malformed hits left out: hit 'No 2' is cut off"),
    "degenerate": (
        HITS + "No 2\n>2xyz_B x\nProbab=9 E-value=1 Score=2 Aligned_cols=1 Identities=0% Similarity=0 Sum_probs=0 "
        "Template_Neff=7\n\n",
        ["1bbb_A"],
        "blocks of different length, or none",
    ),
    "foreign name": (HITS + HITS.replace(">1BBB_A", ">UNIPROT|P1"), ["1bbb_A"], "has no chain name"),
    "huge number": (HITS + HITS.replace("   1 AGS", "   99999999999999999999 AGS"), ["1bbb_A"], "unreadable block"),
    "no number": (HITS + HITS.replace("Sum_probs=9.0", "Sum_probs=nan"), ["1bbb_A"], "unreadable number"),
    "not gzip": (b"\x1f\x8b no", [], "without templates"),
}


@pytest.mark.parametrize("name", HIT_FILES)
def test_a_hit_file_costs_no_alignment(tmp_path, name):
    """No hits are an ordinary answer; a bad hit is left out with a note and the others stay."""
    layout = raw_folder(tmp_path)
    text, found, note = HIT_FILES[name]
    file = tmp_path / "aligned" / "pdb" / "1aaa_A" / "hhr" / "pdb70_hits.hhr"
    write(file if isinstance(text, str) else file.with_name(file.name + ".gz"), text)
    if not isinstance(text, str):
        file.unlink()
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    record = Store(tmp_path / "store").read("1aaa_A")
    assert record.msa.shape == (2, 12)
    assert [t.name for t in record.templates] == found
    notes = {(r.kind, r.name): r.reason for r in read_rejections(tmp_path / "store")}
    assert notes.keys() == ({("note", "1aaa_A")} if note else set())
    assert (note or "") in notes.get(("note", "1aaa_A"), "")


def test_files_beside_the_known_ones_are_noted_and_counted(tmp_path):
    """Per folder in rejected.csv, with their number at the end; compressed files of known names are read."""
    layout = raw_folder(tmp_path)
    folder = tmp_path / "aligned" / "pdb" / "1aaa_A"
    write(folder / "a3m" / "mgnify_hits.a3m.xz", lzma.compress(a3m("AGSMKWDEF---").encode()))
    write(folder / "a3m" / "bfd_uniclust_hits.a3m.bz2", bz2.compress(a3m("AGSMKWDEFIL-", "AGSMKWD-----").encode()))
    write(folder / "sto" / "uniprot_hits.sto", "x")
    lines: list[str] = []
    prepare.prepare(layout, tmp_path / "store", report=lines.append)
    assert Store(tmp_path / "store").read("1aaa_A").msa.shape == (4, 12)
    assert reasons(tmp_path / "store")["1aaa_A"].startswith("not read: uniprot_hits.sto; read are uniref90_hits")
    assert any("not read: 1 x uniprot_hits.sto; read are" in line for line in lines)


def test_an_empty_alignment_folder_means_the_query_alone(tmp_path):
    """No text at all is a valid alignment of one row."""
    layout = raw_folder(tmp_path)
    (tmp_path / "aligned" / "pdb" / "1bbb_A").mkdir()
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    store = Store(tmp_path / "store")
    assert store.table.has_alignment.tolist() == [True, True]
    assert store.read("1bbb_A").msa.shape == (1, 12)


def test_a_query_row_that_differs_from_seqres_is_kept_with_a_note(tmp_path):
    """As in the reference, which does not compare them."""
    layout = raw_folder(tmp_path)
    write(tmp_path / "aligned" / "pdb" / "1bbb_A" / "uniref90_hits.a3m", a3m("AGSMKWDEFIWW"))
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    found = {(r.kind, r.reason) for r in read_rejections(tmp_path / "store") if r.name == "1bbb_A"}
    assert ("note", "the alignment's query row differs from SEQRES in 2 of 12 residues") in found
    assert Store(tmp_path / "store").table.has_alignment.tolist() == [True, True]


def test_folders_without_structure_and_second_folders_of_a_cluster_are_listed(tmp_path):
    """Both are left out with their reason; an entry given twice counts once."""
    layout = raw_folder(tmp_path)
    folder = tmp_path / "aligned" / "pdb"
    write(folder / "8xyz_A" / "uniref90_hits.a3m", a3m(SEQUENCE))
    write(folder / "9zzz_A" / "uniref90_hits.a3m", a3m(SEQUENCE))
    write(tmp_path / "mmcif" / "aa" / "1aaa.cif.gz", gzip.compress(peptide(MONOMERS, pdb_id="1AAA").text().encode()))
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    found = {(r.kind, r.name): r.reason for r in read_rejections(tmp_path / "store")}
    assert "none of its chains has a structure" in found["alignment", "8xyz_A"]
    assert "already uses" in found["note", "9zzz_A"]
    assert "given in several files" in found["chain", "1aaa_A"]
    assert len(Store(tmp_path / "store")) == 2


def test_an_unforeseen_defect_is_listed_as_one(tmp_path, monkeypatch):
    """It must not cost the other half a million chains."""
    layout = raw_folder(tmp_path)
    read = structures.mmcif.read_entry

    def broken(path):
        if "1bbb" in path.name:
            raise KeyError("surprise")
        return read(path)

    monkeypatch.setattr(structures.mmcif, "read_entry", broken)
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    assert reasons(tmp_path / "store")["1bbb"] == "unexpected KeyError: 'surprise'"


def test_missing_folders_and_files_stop_before_any_work(tmp_path):
    """One line that names the path."""
    layout = raw_folder(tmp_path)
    bad = {
        "nowhere: folder of mmCIF": replace(layout, mmcif_dir=tmp_path / "nowhere"),
        "aligned: no": replace(layout, mmcif_dir=tmp_path / "aligned"),
        "absent: alignment folder": replace(layout, alignment_dirs=(tmp_path / "absent",)),
        r"none\.txt: file is missing": replace(layout, clusters_file=tmp_path / "none.txt"),
    }
    for reason, broken in bad.items():
        with pytest.raises(DataError, match=reason):
            prepare.prepare(broken, tmp_path / "store", report=quiet)
    assert not (tmp_path / "store").exists()


BAD_LISTS = {
    "evaluation_file": ("1aaa_A\n1bbb-A\n", r"evaluation_file:2: '1bbb-A' is not a chain id"),
    "evaluation_file csv": (
        "submission_date,pdb_id,chain_id\n2021/09/18,1aaa,A\n",
        r"evaluation_file csv:2: submission_date '2021/09/18' is not",
    ),
    "evaluation_file absent": (
        "7abc_A\n",
        "no structure file for 1 of its entries: 7abc; the store would",
    ),
    "evaluation_file empty": ("\n", "evaluation list is empty"),
    "clusters_file": ("<html>not found</html>\n", "names no PDBID_entity"),
    "obsolete_file": ("<html>not found</html>\n", "no OBSLTE line"),
    "clusters_file latin1": (
        b"1AAA_1\n1B\xfcB_1\n",
        r"clusters_file latin1:2: byte 9 \(0xfc\) is not UTF-8 text; save",
    ),
    "obsolete_file latin1": (b"OBSLTE \xfc\n", r":1: byte 7 \(0xfc\) is not UTF-8"),
    "evaluation_file latin1": (b"1aaa_\xfc\n", r":1: byte 5 \(0xfc\) is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_every_list_is_checked_before_any_work(tmp_path, name):
    """A typo in a list costs seconds: nothing has been written yet."""
    text, message = BAD_LISTS[name]
    layout = replace(raw_folder(tmp_path), **{name.split()[0]: write(tmp_path / name, text)})
    with pytest.raises(DataError, match=message):
        prepare.prepare(layout, tmp_path / "store", report=quiet)
    assert not (tmp_path / "store").exists()


def test_a_duplicates_list_in_another_encoding_names_the_byte(tmp_path):
    """Before any work, like the other lists."""
    layout = raw_folder(tmp_path)
    write(tmp_path / "aligned" / "duplicate_pdb_chains.txt", b"1aaa_A 9z\xe9z_A\n")
    with pytest.raises(DataError, match=r"duplicate_pdb_chains.txt:1: byte 9 \(0xe9\) is not UTF-8"):
        prepare.prepare(layout, tmp_path / "store", report=quiet)


def test_other_clusters_or_another_evaluation_list_keep_the_work(tmp_path, monkeypatch):
    """In a finished store and in one that was stopped; the result is that of a preparation with the right lists."""
    monkeypatch.setattr(rawlayout, "_MIN_UNIT_BYTES", 1)
    right = replace(raw_folder(tmp_path), evaluation_file=write(tmp_path / "right.txt", "1BBB_A\n"))
    wrong = replace(right, evaluation_file=write(tmp_path / "wrong.csv", _TARGETS), clusters_file=None)
    prepare.prepare(right, tmp_path / "right", report=quiet)
    lines: list[str] = []
    prepare.prepare(wrong, tmp_path / "finished", report=lines.append)
    assert any("training, which takes only chains that have one, will find none" in line for line in lines)
    assert "1 not in the store (1zzz_A)" in lines[-1]
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "finished").rglob("*.h5")}
    summary = prepare.prepare(right, tmp_path / "finished", report=quiet)
    assert (summary.units_done, summary.already_done) == (0, False)
    assert shards == {p: p.stat().st_mtime_ns for p in (tmp_path / "finished").rglob("*.h5")}
    assert contents(tmp_path / "finished") == contents(tmp_path / "right")
    assert verify_data(tmp_path / "finished").problems == []
    _stop_before_the_last_stage(wrong, tmp_path / "stopped", monkeypatch)
    summary = prepare.prepare(right, tmp_path / "stopped", report=quiet)
    assert (summary.units_done, summary.units_found) == (0, 3)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "right")


_TARGETS = "submission_date,pdb_id,chain_id\n2021-10-02,1AAA,A\n2021-10-02,1zzz,A\n"


def _stop_before_the_last_stage(layout, out_dir, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_finish", lambda *args: sys.exit(3))
        with pytest.raises(SystemExit):
            prepare.prepare(layout, out_dir, report=quiet)


def test_what_trains_and_evaluates_is_counted_per_filter(tmp_path):
    """And every evaluation target that is dropped has its line, whatever the form of the list."""
    listed = write(tmp_path / "eval.txt", "1AAA_A\n1aaa_A\n1bbb_Q\n9xxx_A\n")
    lines: list[str] = []
    prepare.prepare(replace(raw_folder(tmp_path), evaluation_file=listed), tmp_path / "store", report=lines.append)
    assert "no structure file for 1 of its entries: 9xxx" in lines[0]
    assert lines[-2].startswith("training: 2 of 2 chains pass the filters (refused: 0 by date, 0 by resolution")
    assert "1 chains of 4 in" in lines[-1]
    assert "1 given twice; 2 not in the store (1aaa_A, 1bbb_Q, 9xxx_A)" in lines[-1]
    found = {r.name: r.reason for r in read_rejections(tmp_path / "store") if r.kind == "target"}
    assert found["9xxx_A"] == "evaluation target left out: not in the store"
    assert len(found) == 3


def test_a_store_of_an_older_version_is_confirmed(tmp_path):
    """Its manifest has no fingerprint of the stages and it keeps no entities."""
    layout = raw_folder(tmp_path)
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["work_fingerprint"], manifest["files"]["index/entities.json"]
    path.write_text(json.dumps(manifest))
    (tmp_path / "store" / "index" / "entities.json").unlink()
    assert prepare.prepare(layout, tmp_path / "store", report=quiet).already_done
    assert verify_data(tmp_path / "store").problems == []
    with pytest.raises(DataError, match="holds a store of other raw files or settings"):
        prepare.prepare(replace(layout, clusters_file=None), tmp_path / "store", report=quiet)


@pytest.mark.parametrize("workers", [0, -3])
def test_a_number_of_workers_that_cannot_work_is_refused(tmp_path, workers):
    """Before anything is read."""
    with pytest.raises(DataError, match=f"--workers {workers}: at least one process"):
        prepare.prepare(raw_folder(tmp_path), tmp_path / "store", workers, report=quiet)


def test_links_that_lead_nowhere_have_their_line(tmp_path):
    """Entries, alignment folders and alignment files; an alignment without one of its files would be another one."""
    layout = raw_folder(tmp_path)
    (tmp_path / "mmcif" / "xy").mkdir()
    (tmp_path / "mmcif" / "xy" / "3xyz.cif.gz").symlink_to("gone")
    (tmp_path / "mmcif" / "4abc").symlink_to("gone")
    write(tmp_path / "mmcif" / "5abc.cif.zst", "x")
    folder = tmp_path / "aligned" / "pdb"
    (folder / "6abc_A").symlink_to("gone")
    (folder / "1bbb_A" / "a3m").mkdir(parents=True)
    (folder / "1bbb_A" / "a3m" / "uniref90_hits.a3m").symlink_to("gone")
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    found = {(r.kind, r.name): r.reason for r in read_rejections(tmp_path / "store") if r.kind != "note"}
    link = "dangling link: gone is not there"
    assert found == {
        ("entry", "3xyz"): link,
        ("entry", "4abc"): link,
        ("entry", "5abc"): "structures are read as .cif or .cif.gz only",
        ("alignment", "6abc_A"): link,
        ("alignment", "1bbb_A"): link,
    }
    assert Store(tmp_path / "store").table.has_alignment.tolist() == [True, False]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e30", "100001"])
def test_coordinates_that_are_no_place_reject_the_entry(tmp_path, value):
    """They would be stored and turn up as a loss that is not finite."""
    layout = raw_folder(tmp_path)
    entry = peptide(MONOMERS, pdb_id="1CCC")
    entry = replace(entry, atoms=[replace(entry.atoms[0], y=value), *entry.atoms[1:]])
    write(tmp_path / "mmcif" / "1ccc.cif", entry.text())
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    assert "Cartn" in reasons(tmp_path / "store")["1ccc"]
    assert "1ccc_A" not in Store(tmp_path / "store").chain_ids


def test_hours_are_estimated_before_the_work_starts(tmp_path):
    """Then progress with rate and time left."""
    lines: list[str] = []
    prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=lines.append)
    assert "core-hours" in lines[0]
    assert "2 structure files" in lines[0]
    assert "items/s" in lines[1]
    assert "min left" in lines[1]


# --- verification -----------------------------------------------------------------------------------------------------


def test_a_whole_store_has_no_problems(tmp_path):
    """Quick or with checksums."""
    prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=quiet)
    for quick in (True, False):
        verified = verify_data(tmp_path / "store", quick)
        assert verified.problems == []
        assert verified.num_chains == 2
    assert verified.num_bytes == read_manifest(tmp_path / "store").store_bytes


def test_every_kind_of_damage_is_found(tmp_path):
    """A flipped byte needs checksums, a missing or cut file does not; without manifest nothing can be said."""
    prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=quiet)
    shard = tmp_path / "store" / "structures" / "00000.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert verify_data(tmp_path / "store", quick=True).problems == []
    assert "SHA-256 differs" in verify_data(tmp_path / "store").problems[0]
    shard.write_bytes(data[:-1])
    assert "bytes, the manifest says" in verify_data(tmp_path / "store", quick=True).problems[0]
    shard.unlink()
    assert "file is missing" in verify_data(tmp_path / "store", quick=True).problems[0]
    (tmp_path / "store" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not a manifest"):
        verify_data(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        verify_data(tmp_path / "store")


# --- selection --------------------------------------------------------------------------------------------------------


def selectable(tmp_path, **entries) -> Store:
    """A store of crafted chains; each entry is (monomers, date, resolution text)."""
    for pdb_id, (monomers, date, resolution) in entries.items():
        entry = peptide(monomers, pdb_id=pdb_id, dates=(date,), extra=f"_refine.ls_d_res_high {resolution}\n")
        write(tmp_path / "mmcif" / f"{pdb_id}.cif", entry.text())
    write(tmp_path / "clusters.txt", "\n".join(f"{pdb_id}_1" for pdb_id in entries if pdb_id != "6NOC") + "\n")
    layout = RawLayout(tmp_path / "mmcif", clusters_file=tmp_path / "clusters.txt")
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    return Store(tmp_path / "store")


def test_each_training_filter_rejects_its_chain(tmp_path):
    """Release date, resolution, share of one residue (0.8 is allowed), cluster."""
    store = selectable(
        tmp_path,
        **{
            "1OKA": (MONOMERS, "2021-09-16", "8.99"),
            "2NAN": (MONOMERS, "1980-01-01", "?"),
            "3DAT": (MONOMERS, "2021-09-17", "1.0"),
            "4RES": (MONOMERS, "2000-01-01", "9.0"),
            "5AAA": (["ALA"] * 9 + ["GLY"] * 2, "2000-01-01", "1.0"),
            "5BBB": (["ALA"] * 8 + ["GLY"] * 2, "2000-01-01", "1.0"),
            "6NOC": (MONOMERS, "2000-01-01", "1.0"),
        },
    )
    filters = selection.training_filters(store.table)
    failed = {
        name: [rule for rule in vars(filters) if not vars(filters)[rule][i]] for i, name in enumerate(store.chain_ids)
    }
    assert failed == {
        "1oka_A": [],
        "2nan_A": [],
        "3dat_A": ["date"],
        "4res_A": ["resolution"],
        "5aaa_A": ["residue_share"],
        "5bbb_A": [],
        "6noc_A": ["cluster"],
    }


def test_training_chains_need_alignments(tmp_path):
    """An error that counts and names them, or the flag; cluster sizes count what remains."""
    prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=quiet)
    table = Store(tmp_path / "store").table
    with pytest.raises(DataError, match="1 of 2 training chains have no alignment, first 1bbb_A"):
        selection.training_set(table)
    with pytest.raises(DataError, match=r"0 of 2 chains pass the filters .*, 2 by cluster"):
        selection.training_set(replace(table, cluster_id=np.array([-1, -1])))
    chosen = selection.training_set(table, filter_by_alignments=True)
    assert chosen.rows.tolist() == [0]
    assert chosen.cluster_size.tolist() == [1]
    assert chosen.weights.tolist() == [256 / 512]


def test_sampling_weights_follow_length_and_cluster(tmp_path):
    """clip(L, 256, 512) / 512 / sqrt(cluster size)."""
    prepare.prepare(raw_folder(tmp_path), tmp_path / "store", report=quiet)
    table = Store(tmp_path / "store").table
    larger = replace(table, alignment=np.array([0, 0]), length=np.array([384, 9999]))
    weights = selection.training_set(larger).weights
    np.testing.assert_allclose(weights, [384 / 512 / np.sqrt(2), 1 / np.sqrt(2)], rtol=1e-15)


def test_evaluation_targets_are_looked_up_by_asym_then_author_id(tmp_path):
    """Out-of-window, absent, long and repeated targets are dropped; plain chain ids are taken as they are."""
    atoms = [replace(a, author="Z") for a in peptide(MONOMERS).atoms]
    write(tmp_path / "mmcif" / "7tgt.cif", peptide(MONOMERS, pdb_id="7TGT", atoms=atoms).text())
    prepare.prepare(RawLayout(tmp_path / "mmcif"), tmp_path / "store", report=quiet)
    table = Store(tmp_path / "store").table
    date = "2021-10-02"
    for chain, when, found in (("A", date, True), ("Z", date, True), ("Q", date, False), ("A", "2021-12-18", False)):
        targets = [selection.Target(when, "7tgt", chain)] * 2
        if found:
            assert selection.evaluation_set(table, targets).tolist() == [0]
        else:
            with pytest.raises(DataError, match="none of the"):
                selection.evaluation_set(table, targets)
    assert selection.evaluation_set(table, ["7tgt_Z"]).tolist() == [0]
    with pytest.raises(DataError, match="none of the"):
        selection.evaluation_set(table, ["7tgt_Z"], max_length=11)


def test_evaluation_lists_are_read_or_refused(tmp_path):
    """The benchmark's own table, a csv, a plain list; anything else is named."""
    assert len(selection.read_targets()) == 183
    csv = write(tmp_path / "t.csv", "submission_date,pdb_id,chain_id\n2021-09-18,7BGG,A\n")
    assert selection.read_evaluation_file(csv) == [selection.Target("2021-09-18", "7bgg", "A")]
    assert selection.read_evaluation_file(write(tmp_path / "l.txt", "7BGG_A\n\n1abc_B\n")) == ["7bgg_A", "1abc_B"]
    with pytest.raises(DataError, match="is not a chain id"):
        selection.read_evaluation_file(write(tmp_path / "x.txt", "hello\n"))
    with pytest.raises(DataError, match="needs columns"):
        selection.read_evaluation_file(write(tmp_path / "y.csv", "a,b\n1,2\n"))
    with pytest.raises(DataError, match="is missing"):
        selection.read_evaluation_file(tmp_path / "z.csv")


def test_the_evaluation_list_travels_with_the_store(tmp_path):
    """Copied, and part of the manifest."""
    layout = replace(raw_folder(tmp_path), evaluation_file=write(tmp_path / "eval.txt", "1aaa_A\n"))
    prepare.prepare(layout, tmp_path / "store", report=quiet)
    assert (tmp_path / "store" / "evaluation_targets.txt").read_text() == "1aaa_A\n"
    assert "evaluation_targets.txt" in read_manifest(tmp_path / "store").files
