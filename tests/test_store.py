"""Records and shards come back bit for bit; damage is named; nothing is opened before it is read."""

import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefold.data import residues
from scalefold.data.store import codec, store
from scalefold.data.store.manifest import Manifest, write_manifest
from scalefold.errors import DataError


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["deflate", "shuffle", "delta"]), st.sampled_from("uif"))
def test_every_coding_is_lossless(seed, coding, kind):
    """Random arrays of any shape; differences wrap around."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(0, 6, rng.integers(1, 4)))
    if kind == "f" and coding != "delta":
        array = rng.normal(size=shape).astype(np.float32)
    else:
        dtype = np.dtype(rng.choice(["u1", "u2", "i4", "i8"]))
        array = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype=dtype)
    record = codec.Record(codec.pack({"n": seed}, {"a": (array, coding), "b": (array[:1], "shuffle")}), "test")
    assert record.facts == {"n": seed}
    for name, expected in (("a", array), ("b", array[:1])):
        assert record[name].dtype == expected.dtype
        np.testing.assert_array_equal(record[name], expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_structures_are_kept_bit_for_bit(seed, length, three_decimals):
    """Three-decimal coordinates take the integer path, any other floats the plain one."""
    rng = np.random.default_rng(seed)
    mask = rng.random((length, 37)) < 0.3
    values = rng.uniform(-999, 999, (length, 37, 3))
    rounded = np.round(values, 3) + 0.0  # a negative zero would be no integer: the test below
    positions = np.where(mask[..., None], rounded if three_decimals else values, 0).astype(np.float32)
    record = codec.Record(codec.pack_structure({}, positions, mask), "test")
    assert (record["coordinates"].dtype == np.int32) == (three_decimals or not mask.any())
    again, mask_again = codec.unpack_structure(record)
    np.testing.assert_array_equal(again.view(np.uint32), positions.view(np.uint32))
    np.testing.assert_array_equal(mask_again, mask)


def test_a_negative_zero_coordinate_is_kept():
    """ "-0.000" stands in real entries; an integer would lose its sign."""
    positions = np.zeros((1, 37, 3), dtype=np.float32)
    positions[0, 1] = [-0.0, 1.5, 0.0]
    mask = np.arange(37)[None] == 1
    again, _ = codec.unpack_structure(codec.Record(codec.pack_structure({}, positions, mask), "test"))
    assert np.signbit(again[0, 1]).tolist() == [True, False, False]


def random_msa(rng, rows=50, length=30, largest=90):
    msa = rng.integers(0, 22, (rows, length)).astype(np.uint8)
    deletions = np.where(rng.random(msa.shape) < 0.05, rng.integers(0, largest, msa.shape), 0)
    return msa, deletions


@pytest.mark.parametrize(("largest", "dtype"), [(200, np.uint8), (60_000, np.uint16), (70_000, np.int32)])
def test_alignments_are_kept_exactly_in_the_smallest_type(monkeypatch, largest, dtype):
    """Over several blocks; deletion counts take as many bytes as the largest needs."""
    monkeypatch.setattr(codec, "_BLOCK_LETTERS", 300)
    msa, deletions = random_msa(np.random.default_rng(1), largest=largest)
    deletions[3, 4] = largest
    record = codec.Record(codec.pack_msa({}, msa, deletions, store.count_letters(msa)), "test")
    letters, counts = codec.unpack_msa(record)
    assert counts.dtype == dtype
    np.testing.assert_array_equal(letters, msa)
    np.testing.assert_array_equal(counts, deletions)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_subset_of_rows_equals_the_same_rows_of_the_whole(seed):
    """And blocks without a wanted row are not decoded: they are damaged here."""
    rng = np.random.default_rng(seed)
    msa, deletions = random_msa(rng, rows=int(rng.integers(1, 60)), length=9000)  # 29 rows per block
    data = codec.pack_msa({}, msa, deletions, store.count_letters(msa))
    record = codec.Record(data, "test")
    rows = np.flatnonzero(rng.random(len(msa)) < 0.3)
    letters, counts = codec.unpack_msa(record, rows)
    np.testing.assert_array_equal(letters, msa[rows])
    np.testing.assert_array_equal(counts, deletions[rows])
    if len(msa) > 29:
        assert codec.unpack_msa(codec.Record(data[:-1], "cut"), np.arange(29))[0].shape == (29, 9000)


def test_rows_out_of_order_or_range_are_refused():
    """Row numbers ascend, as a reader of blocks needs."""
    msa, deletions = random_msa(np.random.default_rng(0))
    record = codec.Record(codec.pack_msa({}, msa, deletions, store.count_letters(msa)), "test")
    for rows in ([3, 2], [0, 0], [-1], [50]):
        with pytest.raises(ValueError, match="rows must ascend"):
            codec.unpack_msa(record, np.array(rows))


def test_a_damaged_record_is_named():
    """Header and section."""
    data = codec.pack({}, {"a": (np.arange(100), "shuffle")})
    with pytest.raises(DataError, match=r"shard: chain 1abc_A: stored record is damaged \(header"):
        codec.Record(b"\x07" + data[1:], "shard: chain 1abc_A")
    with pytest.raises(DataError, match=r"damaged \(a"):
        codec.Record(data[:-4], "x")["a"]


def make_store(folder, sequences=("ACDXW", "GGG", "MK"), with_alignment=(0,)):
    """A store written by hand: chains 1abc_A, 1abc_B, ..., an alignment of 4 rows for some."""
    structures = store.ShardWriter(folder / "structures" / "00000.h5")
    alignments = store.ShardWriter(folder / "alignments" / "00000.h5")
    places, table_places, alignment_places = [], [], []
    for number, sequence in enumerate(sequences):
        positions = np.round(np.random.default_rng(number).uniform(-9, 9, (len(sequence), 37, 3)), 3).astype(np.float32)
        mask = np.ones((len(sequence), 37), dtype=bool)
        places.append(structures.append(codec.pack_structure({"sequence": sequence}, positions, mask)))
        if number in with_alignment:
            msa, deletions = random_msa(np.random.default_rng(number), 4, len(sequence))
            packed = codec.pack_msa({}, msa, deletions, store.count_letters(msa))
            alignment_places.append((4, len(sequence), *alignments.append(packed)))
            position = np.arange(len(sequence), dtype=np.int32) - 1
            hits = [
                store.TemplateHit("1abc_B", 9.5, True, "", np.minimum(position, 2)),
                store.TemplateHit("9zzz_Q", 8.5, False, "no such chain", np.full_like(position, -1)),
            ]
            table_places.append((0, *alignments.append(store.pack_templates(hits, [1, -1], len(sequence)))))
        else:
            table_places.append((-1, -1, 0))
    structures.close()
    alignments.close()
    names = np.array([f"1abc_{'ABCDEF'[i]}".encode() for i in range(len(sequences))])
    has = np.isin(np.arange(len(names)), with_alignment)
    asym = [f"{'ABCDEF'[i]};W{i}".encode() for i in range(len(names))]
    store.write_table(
        folder / "index",
        "chain",
        store.ChainTable(
            chain_id=names,
            length=np.array([len(s) for s in sequences], dtype=np.int32),
            release_date=np.array(["2000-01-01"] * len(names), dtype="datetime64[D]"),
            resolution=np.full(len(names), np.nan),
            cluster_id=np.zeros(len(names), dtype=np.int32),
            max_residue_share=np.full(len(names), 0.2),
            num_ca=np.array([len(s) for s in sequences], dtype=np.int32),
            asym_ids_text=np.frombuffer(b"".join(asym), dtype=np.uint8),
            asym_ids_end=np.cumsum([len(a) for a in asym]),
            alignment=np.where(has, np.cumsum(has) - 1, -1).astype(np.int32),
            msa_rows=np.where(has, 4, 0).astype(np.int32),
            num_template_hits=np.where(has, 2, 0).astype(np.int32),
            structure_shard=np.zeros(len(names), dtype=np.int32),
            structure_offset=np.array([p[0] for p in places]),
            structure_bytes=np.array([p[1] for p in places]),
            template_shard=np.array([p[0] for p in table_places]),
            template_offset=np.array([p[1] for p in table_places]),
            template_bytes=np.array([p[2] for p in table_places]),
            order=np.argsort(names).astype(np.int32),
        ),
    )
    rows, lengths, offsets, sizes = np.array(alignment_places, dtype=np.int64).reshape(-1, 4).T
    name = np.array([b"1abc_A"] * len(rows), dtype="S6")
    table = store.AlignmentTable(name, rows, lengths, np.zeros_like(rows), offsets, sizes)
    store.write_table(folder / "index", "alignment", table)
    counts = {"chains": len(names), "alignments": len(rows)}
    write_manifest(folder, Manifest("test", {}, counts, 0, {}))
    return store.Store(folder)


def test_a_record_holds_structure_alignment_and_templates(tmp_path):
    """By row and by name; the template is gathered from its own chain when asked for."""
    opened = make_store(tmp_path)
    record = opened.read("1abc_A")
    msa, deletions = random_msa(np.random.default_rng(0), 4, 5)
    assert (record.chain_id, record.sequence, record.release_date) == ("1abc_A", "ACDXW", "2000-01-01")
    np.testing.assert_array_equal(record.msa, msa)
    np.testing.assert_array_equal(record.deletion_matrix, deletions)
    np.testing.assert_array_equal(record.msa_counts, store.count_letters(msa))
    good, bad = record.templates
    assert (good.name, good.sum_probs, good.ok) == ("1abc_B", 9.5, True)
    assert [residues.HHBLITS_LETTERS[i] for i in good.aatype] == list("-GGGG")
    other = opened.read_structure("1abc_B")
    centre = other.positions[other.mask].mean(axis=0)
    np.testing.assert_array_equal(good.all_atom_positions[1], other.positions[0] - centre)
    assert good.all_atom_mask.sum() == 4 * 37
    assert (bad.ok, bad.reason) == (False, "no such chain")


def test_parts_are_read_without_the_rest(tmp_path):
    """Rows, counts and records without rows."""
    opened = make_store(tmp_path)
    whole = opened.read(0)
    letters, deletions = opened.read_msa_rows(0, np.array([1, 3]))
    np.testing.assert_array_equal(letters, whole.msa[[1, 3]])
    np.testing.assert_array_equal(deletions, whole.deletion_matrix[[1, 3]])
    np.testing.assert_array_equal(opened.read_msa_counts(0), whole.msa_counts)
    assert opened.read(0, msa=False).msa.shape == (0, 5)


def test_a_chain_without_alignment_has_its_query_as_only_row(tmp_path):
    """One row, no deletions, no templates; the table says that there is no alignment."""
    opened = make_store(tmp_path)
    record = opened.read("1abc_C")
    assert [residues.HHBLITS_LETTERS[i] for i in record.msa[0]] == list("MK")
    assert record.msa.shape == record.deletion_matrix.shape == (1, 2)
    assert record.templates == []
    assert record.msa_counts.sum() == 2
    assert opened.table.has_alignment.tolist() == [True, False, False]
    np.testing.assert_array_equal(opened.read_msa_rows("1abc_C", np.array([0]))[0], record.msa)


def test_names_are_found_by_binary_search(tmp_path):
    """Also the chains of an entry and their asym ids."""
    opened = make_store(tmp_path)
    assert [opened.index_of(name) for name in opened.chain_ids] == [0, 1, 2]
    assert opened.table.entry_rows("1abc") == [0, 1, 2]
    assert opened.table.entry_rows("1abd") == []
    assert opened.table.asym_ids(1) == ["B", "W1"]
    for unknown in ("0aaa_A", "1abc_AA", "9zzz_Z"):
        with pytest.raises(DataError, match=f"no chain '{unknown}'"):
            opened.index_of(unknown)


def test_a_store_crosses_processes_without_open_files(tmp_path):
    """Pickled after reading, it opens its shards again on the other side."""
    opened = make_store(tmp_path)
    opened.read(0)
    copy = pickle.loads(pickle.dumps(opened))
    assert copy._structures._open == {}
    np.testing.assert_array_equal(copy.read(0).msa, opened.read(0).msa)


def test_a_forked_process_opens_its_own_files(tmp_path, monkeypatch):
    """Handles are never shared with the parent."""
    opened = make_store(tmp_path)
    opened.read(0)
    parent = opened._structures._open[0][0]
    monkeypatch.setattr(store.os, "getpid", lambda: -7)
    opened.read(0)
    assert opened._structures._open[0][0] is not parent


def test_only_so_many_shards_stay_open(tmp_path, monkeypatch):
    """The oldest is closed first."""
    monkeypatch.setattr(store, "_MAX_OPEN_SHARDS", 2)
    reader = store.ShardReader(tmp_path)
    for shard in range(4):
        writer = store.ShardWriter(tmp_path / f"{shard:05d}.h5")
        place = writer.append(codec.pack({"shard": shard}, {}))
        writer.close()
        assert reader.read(shard, *place, label="x").facts == {"shard": shard}
    assert list(reader._open) == [2, 3]


def test_missing_and_damaged_stores_are_named(tmp_path):
    """Folder without manifest, missing column, missing shard, unreadable shard, short shard."""
    with pytest.raises(DataError, match=r"no manifest\.json"):
        store.Store(tmp_path)
    make_store(tmp_path)
    shard = tmp_path / "structures" / "00000.h5"
    data = shard.read_bytes()
    shard.write_bytes(b"not hdf5")
    with pytest.raises(DataError, match=r"00000\.h5: shard cannot be read"):
        store.Store(tmp_path).read(0)
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.h5: shard is missing"):
        store.Store(tmp_path).read(0)
    shard.write_bytes(data)
    offsets = tmp_path / "index" / "chain.structure_offset.npy"
    np.save(offsets, np.load(offsets) + 10**6)
    with pytest.raises(DataError, match="chain 1abc_A lies beyond the end"):
        store.Store(tmp_path).read(0)
    offsets.unlink()
    with pytest.raises(DataError, match=r"chain\.structure_offset\.npy: index column is missing"):
        store.Store(tmp_path)


def test_an_unfinished_shard_has_no_final_name(tmp_path):
    """Until it is closed."""
    writer = store.ShardWriter(tmp_path / "00000.h5")
    writer.append(b"x" * 100)
    assert not (tmp_path / "00000.h5").exists()
    writer.close()
    assert (tmp_path / "00000.h5").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("num_bytes", [150_000, 9 << 20], ids=["in close", "in append"])
def test_a_disk_that_is_full_is_named_and_nothing_of_the_shard_is_left(tmp_path, full_disk, num_bytes):
    """Whether HDF5 finds out while records come in or at the end."""
    writer = store.ShardWriter(tmp_path / "00000.h5")

    def write():
        writer.append(np.random.default_rng(0).bytes(num_bytes))
        writer.close()

    with pytest.raises(DataError, match=r"00000\.h5: cannot write the shard: File too large; run prepare again"):
        write()
    assert list(tmp_path.iterdir()) == []


def _store_of_one(folder, tiny_store):
    shutil.copytree(tiny_store, folder)
    return folder / "index"


@pytest.mark.parametrize("column", ["chain.structure_offset", "chain.chain_id", "alignment.num_rows"])
def test_a_column_that_states_more_than_it_holds_allocates_nothing(tmp_path, tiny_store, column):
    """A header of a few bytes may ask for any number of gigabytes."""
    path = _store_of_one(tmp_path / "store", tiny_store) / f"{column}.npy"
    data = path.read_bytes()
    shape = f"({len(np.load(path))},)".encode()
    path.write_bytes(data.replace(shape + b", }" + b" " * 12, b"(1073741824,), }" + b" " * (len(shape) - 1), 1))
    assert path.read_bytes() != data
    with pytest.raises(DataError, match=rf"{column}\.npy: index column cannot be read \(states \(1073741824,\)"):
        store.Store(tmp_path / "store")


def test_a_header_that_breaks_the_tokenizer_is_a_damaged_column(tmp_path, tiny_store, monkeypatch):
    """Python 3.12's raises SystemError, on which no other version's can be made to stumble."""
    _store_of_one(tmp_path / "store", tiny_store)

    def broken(*_, **__):
        raise SystemError("<built-in method __new__> returned a result with an exception set")

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", broken)
    with pytest.raises(DataError, match=r"\.npy: index column cannot be read \(<built-in method"):
        store.Store(tmp_path / "store")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("chain.order", 10**6, "damaged"),
        ("chain.alignment", 10**6, "damaged"),
        ("chain.structure_offset", -5, "lies beyond the end"),
        ("chain.structure_bytes", 2**31 - 1, "lies beyond the end"),
        ("alignment.num_bytes", 7, "damaged"),
    ],
)
def test_an_index_that_points_nowhere_is_named(tmp_path, tiny_store, column, value, message):
    """Whatever NumPy would make of it."""
    path = _store_of_one(tmp_path / "store", tiny_store) / f"{column}.npy"
    np.save(path, np.full_like(np.load(path), value))
    opened = store.Store(tmp_path / "store")
    with pytest.raises(DataError, match=message):
        opened.read(opened.index_of(opened.name(0)))
    opened.close()


def test_columns_of_different_length_are_named(tmp_path, tiny_store):
    path = _store_of_one(tmp_path / "store", tiny_store) / "chain.length.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(DataError, match="columns of the chain index differ in length"):
        store.Store(tmp_path / "store")


BAD_SECTIONS = {
    "huge shape": ["a", "<i4", [1 << 40], 8, "deflate"],
    "object": ["a", "|O", [1], 8, "deflate"],
    "expression": ["a", "<i4,(1", [1], 8, "deflate"],
    "negative": ["a", "<i4", [-1], 8, "deflate"],
    "coding": ["a", "<i4", [1], 8, "zip"],
    "no number": ["a", "<i4", ["1"], 8, "deflate"],
    "short": ["a", "<i4"],
}


@pytest.mark.parametrize("name", BAD_SECTIONS)
def test_a_section_that_cannot_be_is_refused_before_it_is_unpacked(name):
    header = json.dumps({"facts": {}, "sections": [BAD_SECTIONS[name]]}).encode()
    with pytest.raises(DataError, match="part of a test: stored record is damaged"):
        codec.Record(len(header).to_bytes(4, "little") + header + bytes(8), "part of a test")


@pytest.mark.parametrize("fact", ["num_rows", "length", "rows_per_block", "deletion_dtype"])
@pytest.mark.parametrize("value", [None, -1, 0, 10**12, "|O"])
def test_facts_that_contradict_the_blocks_are_refused(fact, value):
    msa = np.zeros((3, 4), dtype=np.uint8)
    packed = codec.pack_msa({}, msa, msa, np.zeros((4, 22), dtype=np.uint32))
    record = codec.Record(packed, "test")
    record.facts[fact] = value
    if (fact, value) == ("rows_per_block", 10**12):
        assert codec.unpack_msa(record)[0].shape == (3, 4)
        return
    with pytest.raises(DataError, match="test: stored record is damaged"):
        codec.unpack_msa(record)
