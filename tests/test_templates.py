"""Template hits: parsing, pre-filter, placement in the entry, and the two kept properties of the reference."""

import numpy as np
import pytest

from raw_files import hhr
from scalefold.data import residues
from scalefold.data.raw import align
from scalefold.data.store import templates
from scalefold.data.store.store import gather_template
from scalefold.errors import DataError

QUERY = "MKTAYIAKQRQISFVKSHFSRQ"
TEMPLATE = "GGMKTAYIWKQRQISFVKSHWSRQGG"


def chain(name="A", sequence=TEMPLATE, row=0, spacing=3.8, present=None):
    """A template chain whose C-alpha atoms lie on a line."""
    positions = np.zeros((len(sequence), 37, 3), dtype=np.float32)
    positions[:, residues.CA_ATOM37, 0] = spacing * np.arange(len(sequence))
    mask = np.zeros((len(sequence), 37), dtype=bool)
    mask[:, residues.CA_ATOM37] = True if present is None else present
    return templates.TemplateChain(name, sequence, row, lambda: (positions, mask))


def sources(chains=(), dates=None, obsolete=None):
    dates = {"2abc_A": np.datetime64("2000-01-01")} if dates is None else dates
    return templates.TemplateSources(dates.get, obsolete or {}, lambda _: list(chains))


def query(sequence=QUERY, pdb_id="1tst", date="2001-01-01"):
    return templates.Query(pdb_id, sequence, np.datetime64(date))


def hit(name="2ABC_A", query_row=QUERY, template_row=TEMPLATE[2:-2], sum_probs=20.0, **starts):
    (parsed,) = templates.parse_hhr(hhr([(name, query_row, template_row, sum_probs)], **starts))
    return parsed


def test_hits_are_parsed_with_names_numbers_and_indices():
    """Secondary structure and consensus lines are skipped; indices count from start, -1 at gaps."""
    parsed = hit(query_row="MKT-YI", template_row="MKTAY-", query_start=4, hit_start=11)
    assert (parsed.number, parsed.name, parsed.aligned_cols, parsed.sum_probs) == (1, "2abc_A", 4, 20.0)
    assert parsed.query_indices.tolist() == [3, 4, 5, -1, 6, 7]
    assert parsed.hit_indices.tolist() == [10, 11, 12, 13, 14, -1]
    assert parsed.hit_sequence == "MKTAY"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (">2ABC_A", ">UNIPROT|P1", "no chain name"),
        ("Sum_probs=20.0", "Sum_probs", "no chain name or summary"),
        ("   22 (27)", "   23 (28)", "does not agree with its positions"),
        ("T 2ABC_A", "X 2ABC_A", "different length, or none"),
        ("Aligned_cols=20", "Aligned_cols=x", "unreadable number"),
        ("Aligned_cols=20", f"Aligned_cols=1{400 * '0'}", "unreadable number"),
    ],
)
def test_a_malformed_hit_is_refused_with_its_number(old, new, reason):
    """The line names the hit."""
    text = hhr([("2ABC_A", QUERY, TEMPLATE[2:-2], 20.0)]).replace("Aligned_cols=22", "Aligned_cols=20")
    assert old in text
    with pytest.raises(DataError, match=reason) as error:
        templates.parse_hhr(text.replace(old, new))
    assert "No 1" in str(error.value)


def test_a_cut_file_is_refused():
    """The last hit has no blocks."""
    with pytest.raises(DataError, match="No 1"):
        templates.parse_hhr("No 1\n>2ABC_A x\n")


REJECTIONS = [
    ("not in template_pdb_chain_ids", {}, {}, {"dates": {}}),
    ("template == query", {}, {"pdb_id": "2abc"}, {}),
    ("template_release_date >", {}, {"date": "2000-02-28"}, {}),
    ("align_ratio <=", {}, {"sequence": QUERY * 11}, {}),
    ("is_duplicate", {"template_row": QUERY}, {}, {}),
    ("template too short", {"query_row": QUERY[:9], "template_row": "W" * 9}, {}, {}),
]


@pytest.mark.parametrize(("reason", "of_hit", "of_query", "of_sources"), REJECTIONS, ids=[r[0] for r in REJECTIONS])
def test_each_prefilter_rule_rejects(reason, of_hit, of_query, of_sources):
    """One rule at a time, the others being satisfied."""
    rejected = templates.rejection(hit(**of_hit), "2abc_A", query(**of_query), sources(**of_sources))
    assert rejected is not None
    assert rejected.startswith(reason)


def test_a_hit_sixty_days_older_is_kept():
    """The date limit itself is allowed, and an unknown template date is not tested."""
    assert templates.rejection(hit(), "2abc_A", query(date="2000-03-01"), sources()) is None
    unknown = sources(dates={"2abc_A": np.datetime64("NaT")})
    assert templates.rejection(hit(), "2abc_A", query(date="1990-01-01"), unknown) is None


def test_an_obsolete_entry_is_looked_for_under_its_successor_once():
    """Only if the chain itself is absent."""
    obsolete = templates.parse_obsolete(
        " LIST\nOBSLTE    31-JUL-94 2ABC     3XYZ\nOBSLTE    31-JUL-94 9ABC\nOBSLTE    18-JUL-84 1HHB     2HHB 3HHB\n"
    )
    assert obsolete == {"2abc": "3xyz", "1hhb": "2hhb"}
    assert templates.current_name(hit(), sources(dates={}, obsolete=obsolete)) == "3xyz_A"
    assert templates.current_name(hit(), sources(obsolete=obsolete)) == "2abc_A"


def test_candidates_are_sorted_by_sum_probs_and_stay_in_file_order_among_equals():
    """Descending and stable."""
    text = hhr([(f"2ABC_{c}", QUERY, TEMPLATE[2:-2], p) for c, p in (("A", 1.0), ("B", 3.0), ("C", 1.0), ("D", 3.0))])
    dates = {f"2abc_{c}": np.datetime64("2000-01-01") for c in "ABCD"}
    kept = templates.candidates(templates.parse_hhr(text), query(), sources(dates=dates))
    assert [name for _, name in kept] == ["2abc_B", "2abc_D", "2abc_A", "2abc_C"]


def test_a_hit_found_verbatim_maps_query_residues_to_the_chain():
    """Offset of the hit in the chain plus offset of the segment in the query; letters are the chain's own."""
    parsed = hit(query_row="AYIAKQRQISFV", template_row="AYIWKQRQISFV", query_start=4, hit_start=6)
    featurised, row = templates.featurise(parsed, "2abc_A", query(), sources([chain(row=7)]))
    assert featurised.ok
    assert row == 7
    expected = np.full(len(QUERY), -1)
    expected[3:15] = np.arange(5, 17)
    np.testing.assert_array_equal(featurised.template_position, expected)


def test_other_chains_and_wildcards_are_searched_in_order():
    """Same chain, then any chain, then any chain with X matching every letter."""
    with_x = TEMPLATE.replace("QRQ", "XXX")
    part = TEMPLATE[2:-2]
    same, other, wild = chain("A"), chain("B"), chain("C", with_x)
    assert templates.find_in_entry(part, "B", [same, other]) == (other, 2)
    assert templates.find_in_entry(part, "C", [wild, other]) == (other, 2)
    assert templates.find_in_entry(part, "C", [chain("D", "GGGG"), wild]) == (wild, 2)
    featurised, _ = templates.featurise(hit(), "2abc_C", query(), sources([wild]))
    assert featurised.letters is not None  # the hit's letters, not the chain's X
    assert "".join(residues.HHBLITS_LETTERS[i] for i in featurised.letters) == part


def test_a_changed_chain_is_aligned_again_and_lost_residues_read_the_last_one():
    """Reference: -1 reads the template's last residue. Without reference equality they are gaps."""
    without = TEMPLATE.replace("QRQ", "")
    long_query, long_hit = QUERY + "LEERLGLIEVQ", TEMPLATE[2:-2] + "LEERLGLIEVQ"
    entry = [chain("A", without[:-2] + "LEERLGLIEVQGG")]
    parsed = hit(query_row=long_query, template_row=long_hit)
    kept, _ = templates.featurise(parsed, "2abc_A", query(long_query), sources(entry), reference_equality=True)
    fixed, _ = templates.featurise(parsed, "2abc_A", query(long_query), sources(entry), reference_equality=False)
    lost = np.flatnonzero(fixed.template_position == -1)
    assert kept.ok
    assert fixed.ok
    assert lost.size == 3
    assert set(kept.template_position[lost]) == {len(entry[0].sequence) - 1}
    same = np.setdiff1d(np.arange(len(long_query)), lost)
    np.testing.assert_array_equal(kept.template_position[same], fixed.template_position[same])


def test_a_query_segment_that_is_not_found_shifts_the_map_by_one():
    """Kept for equality; an error of the hit otherwise."""
    parsed = hit(query_row="W" + QUERY[1:])
    kept, _ = templates.featurise(parsed, "2abc_A", query(), sources([chain()]))
    np.testing.assert_array_equal(kept.template_position[:-1], np.arange(3, 3 + len(QUERY) - 1))
    assert kept.template_position[-1] == 2  # query index -1
    fixed, row = templates.featurise(parsed, "2abc_A", query(), sources([chain()]), reference_equality=False)
    assert (fixed.ok, row) == (False, -1)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([chain("B", "WWWWWWWWWWWWWWW"), chain("C", "WWWWWWWWWWWWWWW")], "no chain A to align"),
        ([chain("A", "WWWWWWWWWWWWWWW")], "sequence identity"),
        ([chain("A", "WWWWW")], "too short to align"),
        ([chain(spacing=151.0)], "consecutive C-alpha atoms"),
        ([chain(present=np.arange(len(TEMPLATE)) < 6)], "only 4 atoms"),
    ],
)
def test_an_unusable_hit_says_why(entry, reason):
    """It stays in the list, marked, so that the order of the others is the reference's."""
    featurised, row = templates.featurise(hit(), "2abc_A", query(), sources(entry))
    assert (featurised.ok, row) == (False, -1)
    assert reason in featurised.reason
    with pytest.raises(DataError, match="cannot be used"):
        _ = featurised.aatype


def test_selection_stops_after_twenty_hits_once_four_are_usable():
    """No shuffle of the best 20 can reach further; with fewer usable ones it goes on until there are four."""
    names = [f"2ABC_{i}" for i in range(30)]
    dates = {name.lower(): np.datetime64("2000-01-01") for name in names}
    hits = templates.parse_hhr(hhr([(n, QUERY, TEMPLATE[2:-2], 30.0 - i) for i, n in enumerate(names)]))
    good = sources([chain()], dates)
    assert len(templates.select(hits, query(), good)) == 20
    usable = iter([False] * 21 + [True] * 9)
    mixed = templates.TemplateSources(dates.get, {}, lambda _: [chain()] if next(usable) else [])
    chosen = templates.select(hits, query(), mixed)
    assert [h.ok for h, _ in chosen] == [False] * 21 + [True] * 4


def test_gathered_templates_are_centred_on_the_whole_chain():
    """Centring comes before the gather; absent atoms and gaps are zero, gaps have letter 21."""
    positions, mask = chain().positions_and_mask()
    aatype = residues.sequence_to_aatype(TEMPLATE)
    where = np.array([-1, 2, 3], dtype=np.int32)
    letters, gathered, present = gather_template(aatype, positions, mask, where)
    centre = positions[:, residues.CA_ATOM37].mean(axis=0)
    assert [residues.HHBLITS_LETTERS[i] for i in letters] == ["-", "M", "K"]
    np.testing.assert_allclose(gathered[1:, residues.CA_ATOM37], positions[2:4, residues.CA_ATOM37] - centre, atol=1e-5)
    assert not gathered[0].any()
    assert present.sum() == 2


def test_alignment_of_equal_and_shortened_sequences_is_exact():
    """No wall clock, no external program."""
    assert align.map_residues(QUERY, QUERY).tolist() == list(range(len(QUERY)))
    assert align.map_residues(QUERY[3:], QUERY).tolist() == list(range(3, len(QUERY)))
