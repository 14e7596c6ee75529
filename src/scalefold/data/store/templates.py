"""HHsearch hits to template candidates: parsing, pre-filter, and the map from query to template residues.

AlphaFold 2 Supplement 1.2.3 with the benchmark's settings. The map is all that a store needs: coordinates are gathered
from the template chain's own record when a sample uses it.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from scalefold.data import residues
from scalefold.data.raw import align
from scalefold.data.raw.msa import HHBLITS_OF_BYTE
from scalefold.data.store.store import TemplateHit
from scalefold.errors import DataError

MIN_RELEASE_DISTANCE_DAYS = 60
MIN_ALIGN_RATIO = 0.1
MAX_DUPLICATE_RATIO = 0.95
MIN_HIT_LENGTH = 10
MAX_CA_CA_DISTANCE_ANGSTROM = 150.0
MIN_ATOMS = 5
SHUFFLED_HITS = 20  # training shuffles this many best hits ...
MAX_TEMPLATES = 4  # ... and uses the first four that can be featurised
TOO_MANY = 10**9  # columns: no chain has so many residues

_NAME = re.compile(r"([A-Za-z0-9]{4})_([A-Za-z0-9.]+)")
_SUMMARY = re.compile(
    r"Probab=(\S+)\s+E-value=(\S+)\s+Score=(\S+)\s+Aligned_cols=(\S+)\s+Identities=(\S+)%\s+"
    r"Similarity=(\S+)\s+Sum_probs=(\S+)\s+Template_Neff=(\S+)"
)
_SEGMENT = re.compile(r"\s*(\d{1,9})\s+([A-Z-]*)\s+(\d{1,9})\s+\((\d+)\)")
_NOT_SEQUENCES = ("ss_dssp", "ss_pred", "Consensus")


@dataclass(frozen=True)
class HhrHit:
    """One hit of an hhr file. Segments keep their gaps; index arrays hold -1 at gaps."""

    number: int
    name: str  # pdb id in lower case, underscore, chain
    aligned_cols: int
    sum_probs: float
    query_segment: str
    hit_segment: str
    query_indices: np.ndarray
    hit_indices: np.ndarray

    @property
    def pdb_id(self) -> str:
        """First four characters of the name."""
        return self.name[:4]

    @property
    def chain_id(self) -> str:
        """Author chain id."""
        return self.name[5:]

    @property
    def hit_sequence(self) -> str:
        """Hit letters without gaps."""
        return self.hit_segment.replace("-", "")


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_hhr(text: str, skipped: list[str] | None = None) -> list[HhrHit]:
    """All hits of an hhr file in file order.

    A file without hits, empty or not, is an ordinary answer: nothing resembles the query. A malformed hit is left out
    and its reason appended to ``skipped``; without that list it raises DataError.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("No ")]
    hits = []
    for start, end in itertools.pairwise([*starts, len(lines)]):
        try:
            hits.append(_parse_hit(lines[start:end]))
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return hits


def _parse_hit(lines: list[str]) -> HhrHit:
    title = lines[0].strip()[:40]
    if len(lines) < 3:
        raise DataError(f"hit {title!r} is cut off")
    name = _NAME.match(lines[1][1:])
    summary = _SUMMARY.match(lines[2].strip())
    if not name or not summary:
        raise DataError(f"hit {title!r} has no chain name or summary line")
    query, hit = [], []
    for line in lines[3:]:
        label = line[2:].split(maxsplit=1)[:1]
        if line.startswith(("Q ", "T ")) and label != [] and label[0] not in _NOT_SEQUENCES:
            (query if line[0] == "Q" else hit).append(_segment(line, title))
    if not query or [len(s) for _, s in query] != [len(s) for _, s in hit]:
        raise DataError(f"hit {title!r} has query and template blocks of different length, or none")
    try:
        number, aligned_cols, sum_probs = int(title.split()[-1]), int(summary[4]), float(summary[7])
        if not math.isfinite(sum_probs) or not 0 <= aligned_cols < TOO_MANY:
            raise ValueError(f"Aligned_cols={summary[4][:20]}, Sum_probs={sum_probs}")
        return HhrHit(
            number=number,
            name=f"{name[1].lower()}_{name[2]}",
            aligned_cols=aligned_cols,
            sum_probs=sum_probs,
            query_segment="".join(letters for _, letters in query),
            hit_segment="".join(letters for _, letters in hit),
            query_indices=_indices(query),
            hit_indices=_indices(hit),
        )
    except ValueError as error:
        raise DataError(f"hit {title!r} has an unreadable number ({error})") from error


def _segment(line: str, title: str) -> tuple[int, str]:
    """Start (0-based) and letters of one block line: from column 18 on ``start letters end (total)``."""
    match = _SEGMENT.match(line[17:])
    if not match:
        raise DataError(f"hit {title!r} has an unreadable block line {line[:40]!r}")
    start, letters, end = int(match[1]), match[2], int(match[3])
    if len(letters) - letters.count("-") != end - start + 1:
        raise DataError(f"hit {title!r} has a block whose length does not agree with its positions {start}-{end}")
    return start - 1, letters


def _indices(segments: list[tuple[int, str]]) -> np.ndarray:
    parts = []
    for start, letters in segments:
        is_letter = np.frombuffer(letters.encode(), dtype=np.uint8) != ord("-")
        parts.append(np.where(is_letter, start + np.cumsum(is_letter) - 1, -1))
    return np.concatenate(parts).astype(np.int32)


# --- pre-filter -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """The chain that templates are sought for."""

    pdb_id: str
    sequence: str
    release_date: np.datetime64


@dataclass(frozen=True)
class TemplateSources:
    """What the pre-filter and the featuriser may look up.

    ``release_date`` by chain name is None for a chain that is not in the chain table; a known chain without known
    date has NaT. ``entry`` gives all chains of an entry in order.
    """

    release_date: Callable[[str], np.datetime64 | None]
    obsolete: dict[str, str]  # old entry id -> its successor
    entry: Callable[[str], "list[TemplateChain]"]


@dataclass(frozen=True)
class TemplateChain:
    """A chain that may serve as template."""

    author_chain_id: str
    sequence: str
    row: int  # row in the chain table
    positions_and_mask: Callable[[], tuple[np.ndarray, np.ndarray]]


def parse_obsolete(text: str) -> dict[str, str]:
    """Successor of each obsolete entry, lower case: ``OBSLTE`` lines longer than 30 characters, first successor."""
    lines = (line for line in text.splitlines() if line.startswith("OBSLTE") and len(line) > 30)
    return {line[20:24].lower(): line[29:33].lower() for line in lines}


def current_name(hit: HhrHit, sources: TemplateSources) -> str:
    """The hit's chain name; an absent chain of an obsolete entry is looked for under the entry's successor, once."""
    if sources.release_date(hit.name) is not None or hit.pdb_id not in sources.obsolete:
        return hit.name
    return f"{sources.obsolete[hit.pdb_id]}_{hit.chain_id}"


def rejection(hit: HhrHit, name: str, query: Query, sources: TemplateSources) -> str | None:
    """Why the hit is not a candidate, or None if it is. The first reason that applies wins."""
    release_date = sources.release_date(name)
    if release_date is None:
        return f"not in template_pdb_chain_ids;{name}"
    if name[:4] == query.pdb_id:
        return f"template == query;{name[:4]};{query.pdb_id}"
    max_date = query.release_date - np.timedelta64(MIN_RELEASE_DISTANCE_DAYS, "D")
    if release_date > max_date:  # False for an unknown date (NaT)
        return f"template_release_date > max_template_date;{release_date};{max_date}"
    align_ratio = hit.aligned_cols / len(query.sequence)
    if align_ratio <= MIN_ALIGN_RATIO:
        return f"align_ratio <= min_align_ratio;{align_ratio:.6f};{MIN_ALIGN_RATIO:.6f}"
    length_ratio = len(hit.hit_sequence) / len(query.sequence)
    if hit.hit_sequence in query.sequence and length_ratio > MAX_DUPLICATE_RATIO:
        return f"is_duplicate;{length_ratio:.6f};{MAX_DUPLICATE_RATIO:.6f}"
    if len(hit.hit_sequence) < MIN_HIT_LENGTH:
        return f"template too short;{len(hit.hit_sequence)}"
    return None


def candidates(hits: list[HhrHit], query: Query, sources: TemplateSources) -> Iterator[tuple[HhrHit, str]]:
    """Hits that pass the pre-filter with their current chain names, sum_probs descending, file order among equals."""
    named = [(hit, current_name(hit, sources)) for hit in hits]
    kept = [(hit, name) for hit, name in named if rejection(hit, name, query, sources) is None]
    return iter(sorted(kept, key=lambda pair: -pair[0].sum_probs))


# --- query to template ------------------------------------------------------------------------------------------------


def query_to_hit(hit: HhrHit, query_sequence: str, reference_equality: bool = True) -> dict[int, int]:
    """Query residue -> letter of the gapless hit sequence.

    A query segment that is not part of the query's sequence has offset -1 in the reference, which shifts the whole map
    by one place (``reference_equality``); without it such a hit is an error.
    """
    offset = query_sequence.find(hit.query_segment.replace("-", ""))
    if offset < 0 and not reference_equality:
        raise DataError("the hit's query segment is not part of the query sequence")
    query = hit.query_indices - hit.query_indices[hit.query_indices >= 0].min(initial=1 << 30)
    template = hit.hit_indices - hit.hit_indices[hit.hit_indices >= 0].min(initial=1 << 30)
    paired = (hit.query_indices >= 0) & (hit.hit_indices >= 0)
    paired &= (query + offset < len(query_sequence)) & (template < len(hit.hit_sequence))
    return dict(zip((query[paired] + offset).tolist(), template[paired].tolist(), strict=True))


def find_in_entry(hit_sequence: str, chain_id: str, chains: list[TemplateChain]) -> tuple[TemplateChain, int] | None:
    """The chain and offset where the hit sequence lies: same chain, any chain, any chain with X as wildcard."""
    same = [chain for chain in chains if chain.author_chain_id == chain_id]
    for chain in (*same, *chains):
        offset = chain.sequence.find(hit_sequence)
        if offset >= 0:
            return chain, offset
    for chain in chains:
        offset = _find_with_wildcards(hit_sequence, chain.sequence)
        if offset >= 0:
            return chain, offset
    return None


def _find_with_wildcards(part: str, whole: str) -> int:
    if len(part) > len(whole) or not part:
        return -1
    small = np.frombuffer(part.encode(), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(whole.encode(), dtype=np.uint8), len(small))
    x = ord("X")
    matches = np.all((windows == small) | (windows == x) | (small == x), axis=1)
    return int(np.argmax(matches)) if matches.any() else -1


@dataclass(frozen=True)
class _Placement:
    chain: TemplateChain
    mapping: dict[int, int]  # query residue -> residue of the chain
    letters: str | None  # letters of the hit, where they differ from the chain's


def _place(hit: HhrHit, name: str, query: str, entry: list[TemplateChain], reference_equality: bool) -> _Placement:
    mapping = query_to_hit(hit, query, reference_equality)
    found = find_in_entry(hit.hit_sequence, name[5:], entry)
    if found:
        chain, offset = found
        exact = chain.sequence[offset : offset + len(hit.hit_sequence)] == hit.hit_sequence
        shifted = {q: t + offset for q, t in mapping.items()}
        return _Placement(chain, shifted, None if exact else "-" * offset + hit.hit_sequence)
    chain = next((c for c in entry if c.author_chain_id == name[5:]), entry[0] if len(entry) == 1 else None)
    if chain is None:
        raise DataError(
            f"the hit sequence is in no chain of {name[:4]}, which has no chain {name[5:]} to align it with"
        )
    counterpart = align.map_residues(hit.hit_sequence, chain.sequence)
    realigned = {q: int(counterpart[t]) for q, t in mapping.items()}
    # In the reference an index of -1 reads the template's last residue.
    fixed = {
        q: (t if t >= 0 else len(chain.sequence) - 1) for q, t in realigned.items() if t >= 0 or reference_equality
    }
    return _Placement(chain, fixed, None)


def _check_structure(placement: _Placement) -> None:
    positions, mask = placement.chain.positions_and_mask()
    has_ca = mask[:, residues.CA_ATOM37]
    consecutive = np.flatnonzero(has_ca[1:] & has_ca[:-1])
    ca = positions[:, residues.CA_ATOM37]
    distance = np.linalg.norm(ca[consecutive + 1] - ca[consecutive], axis=1)
    if np.any(distance > MAX_CA_CA_DISTANCE_ANGSTROM):
        raise DataError(f"consecutive C-alpha atoms are {distance.max():.1f} angstrom apart")
    num_atoms = int(mask[list(placement.mapping.values())].sum())
    if num_atoms < MIN_ATOMS:
        raise DataError(f"only {num_atoms} atoms are aligned with the query")


def featurise(
    hit: HhrHit, name: str, query: Query, sources: TemplateSources, reference_equality: bool = True
) -> tuple[TemplateHit, int]:
    """One candidate as a stored hit and its row in the chain table; a hit that cannot be used has ``ok`` False, row -1.

    ``reference_equality`` keeps two properties of the reference that are not intended: a query segment that is not
    found shifts the map by one, and template letters without counterpart read the template's last residue.
    """
    length = len(query.sequence)
    position = np.full(length, -1, dtype=np.int32)
    try:
        placement = _place(hit, name, query.sequence, sources.entry(name[:4]), reference_equality)
        if any(t >= len(placement.chain.sequence) for t in placement.mapping.values()):
            raise DataError("the hit reaches beyond the end of the chain")
        _check_structure(placement)
    except DataError as error:
        return TemplateHit(name, hit.sum_probs, False, str(error), position), -1
    for q, t in placement.mapping.items():  # in order: a query index of -1 is the last residue, as in the reference
        position[q] = t
    letters = None
    if placement.letters is not None:
        ids = HHBLITS_OF_BYTE[np.frombuffer(placement.letters.encode(), dtype=np.uint8)]
        letters = np.where(position >= 0, ids[position], residues.GAP_RESTYPE).astype(np.uint8)
    return TemplateHit(name, hit.sum_probs, True, "", position, letters), placement.chain.row


def select(
    hits: list[HhrHit], query: Query, sources: TemplateSources, reference_equality: bool = True
) -> list[tuple[TemplateHit, int]]:
    """Candidates in order, featurised, as many as any shuffle of the best 20 can ever reach.

    Training shuffles the first 20 and takes the first four usable ones in that order, going on beyond 20 only if
    these hold fewer than four; so nothing after the 20th is needed once four are usable.
    """
    chosen: list[tuple[TemplateHit, int]] = []
    if not query.sequence:
        return chosen
    num_ok = 0
    for hit, name in candidates(hits, query, sources):
        if len(chosen) >= SHUFFLED_HITS and num_ok >= MAX_TEMPLATES:
            break
        chosen.append(featurise(hit, name, query, sources, reference_equality))
        num_ok += chosen[-1][0].ok
    return chosen
