"""Small folds whose sequence says what they look like: helices and strands joined by a few fixed loops.

A fold is a topology (for example helix-helix-helix), the length of each segment and the type of each loop. Every
residue's torsion angles follow from its place in the fold, and its letter class follows from that place and from the
side it shows to the rest of the protein. Loop torsions were found by minimising distance and angle errors of the
neighbouring segments (helices 9.3 angstrom apart and antiparallel; helices 10 angstrom above a hairpin) within 30
degrees of allowed Ramachandran regions.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalefold.data.made import demo_geometry as geometry

HELIX_DEG = (-63.0, -42.0)
STRAND_DEG = (-120.6, 115.2)

# Letter classes: substitutions inside a class keep the fold. A repeated letter is drawn more often.
HELIX_CORE, HELIX_ACIDIC, HELIX_BASIC = "LLAAM", "EEQ", "KKR"
STRAND_CORE, STRAND_OUTER = "VVIIF", "TTTYW"
SMALL, AMIDE, GLYCINE, PROLINE, RING = "SC", "ND", "G", "P", "H"


@dataclass(frozen=True)
class Loop:
    """Residues between two segments: torsions (phi, psi in degrees) and letter class of each."""

    name: str
    torsions_deg: tuple[tuple[float, float], ...]
    letters: tuple[str, ...]


HELIX_HELIX_SHORT = Loop("s", ((82, 25), (-63, 160), (-43, 158)), (GLYCINE, SMALL, PROLINE))
HELIX_HELIX_LONG = Loop("l", ((84, -158), (-62, -51), (-71, 153), (72, 32)), (GLYCINE, RING, PROLINE, AMIDE))
STRAND_STRAND = Loop("t", ((59.0, -128.1), (-84.1, 18.6)), (GLYCINE, AMIDE))  # type II' turn
STRAND_HELIX = Loop("u", ((53, 20), (-68, 170), (-51, 153)), (AMIDE, SMALL, PROLINE))
HELIX_STRAND = Loop("v", ((-83, -15), (82, 24), (-93, 170)), (AMIDE, GLYCINE, RING))
LOOPS: dict[str, tuple[Loop, ...]] = {
    "HH": (HELIX_HELIX_SHORT, HELIX_HELIX_LONG),
    "EE": (STRAND_STRAND,),
    "EH": (STRAND_HELIX,),
    "HE": (HELIX_STRAND,),
}

# Segment lengths tried per topology. The two strands of a hairpin are equally long; the middle strand of a
# three-stranded sheet has an even length, or its two partners would meet on one edge.
TOPOLOGIES: dict[str, tuple[tuple[int, ...], ...]] = {
    "HH": tuple(itertools.product(range(10, 16), range(10, 16))),
    "HHH": tuple(itertools.product(range(7, 13), range(7, 13), range(7, 13))),
    "EEH": tuple((n, n, h) for n in (5, 6, 7, 8) for h in range(9, 14)),
    "HEE": tuple((h, n, n) for n in (5, 6, 7) for h in range(9, 14)),
    "EEE": tuple((a, b, c) for a in range(5, 9) for b in (6, 8) for c in range(5, 9)),
}


@dataclass(frozen=True)
class Fold:
    """A topology with its lengths and loops; equal folds have equal labels."""

    topology: str
    lengths: tuple[int, ...]
    loops: tuple[Loop, ...]

    @property
    def label(self) -> str:
        """For example ``H10-s-H12``."""
        parts = [f"{kind}{n}" for kind, n in zip(self.topology, self.lengths, strict=True)]
        names = [loop.name for loop in self.loops]
        return "-".join(itertools.chain.from_iterable(itertools.zip_longest(parts, names, fillvalue=""))).rstrip("-")

    @property
    def length(self) -> int:
        """Number of residues."""
        return sum(self.lengths) + sum(len(loop.letters) for loop in self.loops)

    def segments(self) -> list[tuple[int, int]]:
        """Half-open residue range of each helix or strand."""
        ranges, start = [], 0
        for i, n in enumerate(self.lengths):
            ranges.append((start, start + n))
            start += n + (len(self.loops[i].letters) if i < len(self.loops) else 0)
        return ranges

    def torsions_deg(self) -> np.ndarray:
        """float64 [L, 2] phi and psi."""
        rows: list[tuple[float, float]] = []
        for i, (kind, n) in enumerate(zip(self.topology, self.lengths, strict=True)):
            rows += [HELIX_DEG if kind == "H" else STRAND_DEG] * n
            rows += self.loops[i].torsions_deg if i < len(self.loops) else ()
        return np.array(rows)

    @functools.cached_property
    def letter_classes(self) -> tuple[str, ...]:
        """Letters allowed at each position."""
        faces_inside = _faces_inside(self)
        classes: list[str] = []
        for i, (kind, (start, stop)) in enumerate(zip(self.topology, self.segments(), strict=True)):
            outer = STRAND_OUTER if kind == "E" else (HELIX_ACIDIC, HELIX_BASIC)[self.topology[:i].count("H") % 2]
            inner = STRAND_CORE if kind == "E" else HELIX_CORE
            classes += [inner if inside else outer for inside in faces_inside[start:stop]]
            classes += self.loops[i].letters if i < len(self.loops) else ()
        return tuple(classes)


def _faces_inside(fold: Fold) -> np.ndarray:
    """bool [L]: whether CB points to the rest of the protein (in a lone sheet: to the side of its first CB)."""
    trace = geometry.backbone(fold.torsions_deg())
    ca, outward = trace[:, 1], geometry.c_beta(trace) - trace[:, 1]
    inside = np.zeros(fold.length, dtype=bool)
    helical = np.zeros(fold.length, dtype=bool)
    segments = fold.segments()
    for kind, (start, stop) in zip(fold.topology, segments, strict=True):
        helical[start:stop] = kind == "H"
    for kind, (start, stop) in zip(fold.topology, segments, strict=True):
        rest = np.ones(fold.length, dtype=bool)
        rest[start:stop] = False
        if kind == "H" or helical.any():
            rest &= helical if kind == "E" else True
            towards = _across_axis(ca[rest].mean(0) - ca[start:stop], ca[start:stop])
        else:  # a twisted sheet has no one normal: the mean direction of every second CB shows the side
            signs = np.where(np.arange(start, stop) % 2 == 0, 1.0, -1.0)
            towards = (signs[:, None] * outward[start:stop]).sum(0) * _sheet_sign(ca, outward, start, signs)
        inside[start:stop] = np.sum(towards * outward[start:stop], axis=-1) > 0
    return inside


def _across_axis(vectors: np.ndarray, ca: np.ndarray) -> np.ndarray:
    """Vectors [n, 3] without their part along the segment: from either end, the middle of the rest lies sideways."""
    along = ca[-4:].mean(0) - ca[:4].mean(0)
    along /= np.linalg.norm(along)
    return vectors - (vectors @ along)[:, None] * along


def _sheet_sign(ca: np.ndarray, outward: np.ndarray, start: int, signs: np.ndarray) -> float:
    """+1 or -1: makes the reference direction of a strand agree with the CB of the nearest residue of strand one."""
    direction = (signs[:, None] * outward[start : start + len(signs)]).sum(0)
    if start == 0:
        return 1.0
    previous = int(np.argmin(np.linalg.norm(ca[:start] - ca[start : start + len(signs)].mean(0), axis=-1)))
    return 1.0 if direction @ (outward[previous] * (1.0 if previous % 2 == 0 else -1.0)) > 0 else -1.0


def is_plausible(fold: Fold) -> bool:
    """Whether the backbone neither collides with itself nor sprawls."""
    trace = geometry.backbone(fold.torsions_deg())
    with_cb = np.concatenate([trace, geometry.c_beta(trace)[:, None]], axis=1)
    if geometry.closest_contact_angstrom(with_cb, min_separation=3) < 3.2:
        return False
    ca = trace[:, 1]
    radius_of_gyration = np.sqrt(np.mean(np.sum((ca - ca.mean(0)) ** 2, axis=-1)))
    return bool(radius_of_gyration < 2.2 * fold.length**0.38 + 2.2)


def draw_folds(topology: str, count: int, min_length: int, max_length: int, rng: np.random.Generator) -> list[Fold]:
    """At most ``count`` different plausible folds of the topology with a length in the given range, in random order."""
    kinds = [topology[i : i + 2] for i in range(len(topology) - 1)]
    loops = list(itertools.product(*(LOOPS[kind] for kind in kinds)))
    candidates = [Fold(topology, lengths, chosen) for lengths in TOPOLOGIES[topology] for chosen in loops]
    shuffled = (candidates[i] for i in rng.permutation(len(candidates)))
    suitable = (fold for fold in shuffled if min_length <= fold.length <= max_length and is_plausible(fold))
    return list(itertools.islice(suitable, count))


def draw_sequence(classes: Sequence[str], rng: np.random.Generator) -> str:
    """A sequence that takes one letter of each position's class."""
    return "".join(letters[rng.integers(len(letters))] for letters in classes)


def mutate(sequence: str, classes: Sequence[str], rate: float, rng: np.random.Generator) -> str:
    """``sequence`` with each position redrawn from its class with probability ``rate``."""
    redrawn = draw_sequence(classes, rng)
    change = rng.random(len(sequence)) < rate
    return "".join(new if c else old for old, new, c in zip(sequence, redrawn, change, strict=True))
