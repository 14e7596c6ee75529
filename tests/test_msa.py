"""Alignment text to integer arrays: the reference's rules and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raw_files import a3m, write
from scalefold.data import residues
from scalefold.data.raw import msa
from scalefold.errors import DataError

LETTERS = "ACDEFGHIKLMNPQRSTVWYX-"


def plain_a3m(text):
    """The definition, letter by letter."""
    rows, deletions = [], []
    for line in text.splitlines():
        if line.startswith(">"):
            rows.append("")
        else:
            rows[-1] += line.strip()
    for i, row in enumerate(rows):
        counts, pending = [], 0
        for letter in row:
            if letter.islower():
                pending += 1
            else:
                counts.append(pending)
                pending = 0
        deletions.append(counts)
        rows[i] = "".join(letter for letter in row if not letter.islower())
    return rows, deletions


@st.composite
def alignments(draw):
    length = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        row = draw(st.text(alphabet=LETTERS, min_size=length, max_size=length))
        inserts = draw(st.lists(st.tuples(st.integers(0, length), st.text(alphabet="acw", max_size=3)), max_size=3))
        for at, letters in sorted(inserts, reverse=True):
            row = row[:at] + letters + row[at:]
        rows.append(row)
    return rows


@settings(max_examples=150, deadline=None)
@given(alignments())
def test_the_vectorised_parser_equals_the_definition(rows):
    """Letters and deletion counts, insertions at both ends included."""
    parsed = msa.parse_a3m(a3m(*rows).encode())
    letters, deletions = plain_a3m(a3m(*rows))
    assert ["".join(map(chr, row)) for row in parsed.letters] == letters
    assert parsed.deletions.tolist() == deletions


@settings(max_examples=100, deadline=None)
@given(st.lists(alignments(), min_size=2, max_size=2))
def test_duplicates_over_files_keep_the_first_row_and_its_deletions(files):
    """Compared without insertions, over all files."""
    width = min(min(map(len, rows)) for rows in files)
    texts = {str(i): a3m(*(r.upper()[:width] for r in rows)).encode() for i, rows in enumerate(files)}
    merged = msa.merge({name: msa.parse_a3m(text) for name, text in texts.items()})
    assert merged is not None
    seen = list(dict.fromkeys(r.upper()[:width] for rows in files for r in rows))
    expected = [[residues.MSA_LETTER_TO_HHBLITS[letter] for letter in row] for row in seen]
    assert merged.msa.tolist() == expected
    assert sum(merged.rows_read.values()) == sum(map(len, files))


def test_the_first_of_equal_rows_keeps_its_own_deletions():
    """The later one's counts are lost with it."""
    merged = msa.merge({"a": msa.parse_a3m(b">q\nACD\n>x\nAaaC-\n"), "b": msa.parse_a3m(b">y\nAC-\n>z\nACcD\n")})
    assert merged is not None
    assert merged.deletions.tolist() == [[0, 0, 0], [0, 2, 0]]


def test_comments_blank_and_wrapped_lines_are_read_as_the_reference_does():
    """Lines are stripped; a sequence may span lines."""
    parsed = msa.parse_a3m(b"#c\n\n>q x y\r\nAC\r\nDE\r\n\n>a\n  AC-E  \n")
    assert ["".join(map(chr, row)) for row in parsed.letters] == ["ACDE", "AC-E"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b">q\nACD\n>a\nAC\n", "row 2 has 2 aligned letters, the first row has 3"),
        (b">q\nACD\n>a\n>b\nACD\n", "row 2 has 0 aligned letters"),
        (b">q\nACD\n>a\nA.C\n", r"row 2 contains '\.'"),
        (b">q\nACD\n>a\nAC*\n", r"row 2 contains '\*'"),
        (b">q\nACD\n\x00", "row 1 contains"),
        (b"ACD\n>q\nACD\n", "before the first header"),
        (b"\n", "no sequence"),
        (b"#only\n", "no sequence"),
        (b">q\n>r\n", "header without a sequence"),
    ],
)
def test_malformed_text_is_refused_with_row_and_reason(text, reason):
    """One line that names the row."""
    with pytest.raises(DataError, match=reason):
        msa.parse_a3m(text)


def test_a_folder_is_read_in_the_order_of_the_benchmark(tmp_path):
    """uniref90 first, then bfd, then mgnify, wherever the files lie; empty files count as absent."""
    write(tmp_path / "a3m" / "mgnify_hits.a3m", a3m("ACD", "WWW"))
    write(tmp_path / "a3m" / "bfd_uniclust_hits.a3m", "")
    write(tmp_path / "a3m" / "uniref90_hits.a3m", a3m("YYY"))
    merged = msa.read_alignment(tmp_path)
    assert merged is not None
    assert [[residues.HHBLITS_LETTERS[i] for i in row] for row in merged.msa] == [list("YYY"), list("ACD"), list("WWW")]
    assert merged.rows_read == {"uniref90_hits.a3m": 1, "mgnify_hits.a3m": 2}


def test_a_folder_without_text_has_no_alignment_and_errors_name_the_file(tmp_path):
    """None for nothing; a ragged file and files of different width are named."""
    assert msa.read_alignment(tmp_path) is None
    write(tmp_path / "uniref90_hits.a3m", ">q\nACD\n>a\nAC\n")
    with pytest.raises(DataError, match=r"uniref90_hits\.a3m: row 2"):
        msa.read_alignment(tmp_path)
    write(tmp_path / "uniref90_hits.a3m", a3m("ACD"))
    write(tmp_path / "mgnify_hits.a3m", a3m("AC"))
    with pytest.raises(DataError, match="files differ in aligned length"):
        msa.read_alignment(tmp_path)


def test_stockholm_is_used_only_where_there_is_no_a3m(tmp_path):
    """Columns in which the query has a gap become insertions, as in a3m."""
    sto = "# STOCKHOLM 1.0\n#=GS q\nq  A.CD\nr  AWC-\n\nq  EF\nr  .F\n//\n"
    write(tmp_path / "sto" / "uniref90_hits.sto", sto)
    merged = msa.read_alignment(tmp_path)
    assert merged is not None
    assert [[residues.HHBLITS_LETTERS[i] for i in row] for row in merged.msa] == [list("ACDEF"), list("AC--F")]
    assert merged.deletions.tolist() == [[0] * 5, [0, 1, 0, 0, 0]]
    write(tmp_path / "a3m" / "mgnify_hits.a3m", a3m("ACDEF"))
    again = msa.read_alignment(tmp_path)
    assert again is not None
    assert again.rows_read == {"mgnify_hits.a3m": 1}


def test_letters_of_one_column_are_counted_exactly():
    """The counts that the profile is made of."""
    from scalefold.data.store.store import count_letters

    rng = np.random.default_rng(0)
    table = rng.integers(0, 22, (300, 7)).astype(np.uint8)
    counts = count_letters(table)
    one_hot = np.eye(22, dtype=np.int64)[residues.HHBLITS_TO_RESTYPE[table]].sum(axis=0)
    np.testing.assert_array_equal(counts, one_hot)
