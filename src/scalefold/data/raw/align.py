"""Pairwise global alignment of two versions of one protein sequence, in process.

Used when a template hit's sequence is not found verbatim in the structure's entry. The reference calls an external
program with a wall-clock limit, so a slow host silently drops templates; here the result depends on the sequences
alone. gemmi's affine-gap aligner with BLOSUM62 decides and maps real pairs as the reference's aligner does
(``benchmarks/measure/template_aligners.py``), and it needs no further dependency.
"""

import gemmi
import numpy as np

from scalefold.data import residues
from scalefold.errors import DataError

MIN_LENGTH = 6
MIN_IDENTITY = 0.9

_RESNAME = {**residues.RESTYPE_1TO3, "X": "UNK"}


def global_alignment(first: str, second: str) -> tuple[str, str]:
    """Both sequences with gaps ("-"), of equal length."""
    names = [[_RESNAME.get(letter, "UNK") for letter in sequence] for sequence in (first, second)]
    result = gemmi.align_string_sequences(names[0], names[1], [], gemmi.AlignmentScoring("b"))
    return result.add_gaps(first, 1), result.add_gaps(second, 2)


def map_residues(old: str, new: str) -> np.ndarray:
    """int32 [len(old)] index in ``new`` of each letter of ``old``, -1 without counterpart.

    Raises DataError if a sequence is shorter than 6 residues or fewer than 90 % of the shorter one's letters agree.
    """
    if min(len(old), len(new)) < MIN_LENGTH:
        raise DataError(f"sequences of {len(old)} and {len(new)} residues are too short to align")
    aligned_old, aligned_new = (np.frombuffer(row.encode(), dtype=np.uint8) for row in global_alignment(old, new))
    gap = ord("-")
    in_old, in_new = aligned_old != gap, aligned_new != gap
    identity = np.count_nonzero((aligned_old == aligned_new) & in_old) / min(len(old), len(new))
    if identity < MIN_IDENTITY:
        raise DataError(f"sequence identity {identity:.6f} with the structure's sequence is below {MIN_IDENTITY}")
    new_index = np.where(in_new, np.cumsum(in_new) - 1, -1)
    return new_index[in_old].astype(np.int32)
