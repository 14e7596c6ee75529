"""Homologues and template hits of the generated proteins."""

from collections.abc import Sequence

import numpy as np

from scalefold.data import residues
from scalefold.data.made import demo_folds as folds
from scalefold.data.made.demo_files import DemoEntry, DemoHit, a3m_text
from scalefold.data.made.demo_folds import Fold

A3M_FILES = ("a3m/uniref90_hits.a3m", "a3m/bfd_uniclust_hits.a3m", "a3m/mgnify_hits.a3m")
NUM_HOMOLOGUES = (8, 60)  # per chain
ANY_LETTER_RATE, GAP_RATE, INSERTION_RATE = 0.02, 0.03, 0.01  # per position
ABSENT_CHAIN = "0NON_A"


def alignment_files(k: int, sequence: str, classes: Sequence[str], rng: np.random.Generator) -> dict[str, str]:
    """a3m texts of a chain by relative path. Chain 1 has empty files only, every tenth chain a single file."""
    if k == 1:
        return dict.fromkeys(A3M_FILES, "")
    count = int(rng.integers(NUM_HOMOLOGUES[0], NUM_HOMOLOGUES[1] + 1))
    rows = [(f"homologue_{k}_{i}", _homologue(sequence, classes, rng)) for i in range(count)]
    if k % 10 == 6:
        return {A3M_FILES[0]: a3m_text([("query", sequence), *rows])}
    texts = {}
    for number, name in enumerate(A3M_FILES):  # every row lies in one file, every fifth also in the next
        chosen = [row for i, row in enumerate(rows) if i % 3 == number or (i % 5 == 0 and (i + 1) % 3 == number)]
        texts[name] = a3m_text([("query", sequence), *chosen])
    return texts


def _homologue(sequence: str, classes: Sequence[str], rng: np.random.Generator) -> str:
    """Aligned row of a relative: mostly substitutions within classes, gaps (``-``), insertions (lower case)."""
    mutated = folds.mutate(sequence, classes, float(rng.uniform(0.2, 0.9)), rng)
    letters = np.array(list(mutated))
    anything = rng.random(len(letters)) < ANY_LETTER_RATE
    letters[anything] = rng.choice(list(residues.RESTYPES), size=int(anything.sum()))
    letters[rng.random(len(letters)) < GAP_RATE] = "-"
    if rng.random() < 0.3:  # a fragment: relatives are often not sequenced to the end
        letters[: rng.integers(1, 6)] = "-"
    inserted = rng.random(len(letters)) < INSERTION_RATE
    return "".join(letter + ("gs" if here else "") for letter, here in zip(letters, inserted, strict=True))


def template_hits(k: int, entries: list[DemoEntry], obsolete_id: str, rng: np.random.Generator) -> list[DemoHit]:
    """Template hits of every fourth entry: itself, its family, others of its topology, an absent chain.

    Entry 0 is named by its obsolete id. A template search knows nothing of the later filters, so hits that are too
    similar or too recent are left in.
    """
    if k % 4 != 2:
        return []
    query = entries[k]
    relatives = [e for e in entries if not e.is_eval and e.fold.topology == query.fold.topology and e is not query]
    family = [e for e in relatives if e.fold == query.fold]
    others = [e for e in relatives if e.fold != query.fold]
    chosen = [query, *family, *(others[i] for i in rng.permutation(len(others))[:4])]
    hits = [align_hit(query, e, obsolete_id if e is entries[0] else e.pdb_id) for e in chosen]
    absent = DemoHit(ABSENT_CHAIN, "chain that is not in the set", query.sequence, 0, query.sequence, 0, 80)
    return sorted([*hits, absent], key=lambda hit: -hit.sum_probs)


def align_hit(query: DemoEntry, template: DemoEntry, pdb_id: str) -> DemoHit:
    """Hit of ``query`` on ``template``: segments side by side, the difference of their lengths as gaps."""
    query_row, hit_row = aligned_rows(query.fold, query.sequence, template.fold, template.sequence)
    name = f"{pdb_id.upper()}_{template.author_chain_ids[0]}"
    return DemoHit(name, template.title, query_row, 0, hit_row, 0, len(template.sequence))


def aligned_rows(query: Fold, query_sequence: str, hit: Fold, hit_sequence: str) -> tuple[str, str]:
    """Rows of two folds of one topology: each segment and loop starts in the same column, gaps follow the shorter."""
    query_row, hit_row = "", ""
    for part, other in zip(_parts(query, query_sequence), _parts(hit, hit_sequence), strict=True):
        width = max(len(part), len(other))
        query_row += part.ljust(width, "-")
        hit_row += other.ljust(width, "-")
    return query_row, hit_row


def _parts(fold: Fold, sequence: str) -> list[str]:
    """Segment, loop, segment, ... of a sequence."""
    parts, previous = [], 0
    for start, stop in fold.segments():
        if previous:
            parts.append(sequence[previous:start])
        parts.append(sequence[start:stop])
        previous = stop
    return parts
