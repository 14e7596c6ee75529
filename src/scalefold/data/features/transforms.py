"""The random steps of a sample and the arithmetic on its alignment, one recycling slice at a time.

Every random step makes a new torch CPU generator with the number it is given (the sample's seed, plus the slice for
steps that differ between slices). Steps therefore see correlated streams; the reference does the same and equality
with it rests on this, on the order of the draws and on torch's generator.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from scalefold.data import residues
from scalefold.data.features.clusters import GAP, MatchTable, count_classes

MASK_TOKEN = 22
NUM_MSA_CLASSES = 23
_SEED_RANGE = 1 << 64
_53_BITS = (1 << 53) - 1
_TINY_PROBABILITY = 1e-10  # keeps classes of probability 0 from dividing 0 by a draw
_COUNT_EPS = np.float32(1e-6)
T = TypeVar("T")


def generator(seed: int) -> torch.Generator:
    """A new torch CPU generator; seeds of 2^64 and more wrap around."""
    return torch.Generator().manual_seed(seed % _SEED_RANGE)


def shuffle_first(items: Sequence[T], count: int, seed: int) -> list[T]:
    """``items`` with the first ``count`` of them shuffled by Python's generator (training templates)."""
    head = list(items[:count])
    random.Random(seed).shuffle(head)
    return head + list(items[count:])


def draw_clamped_fape(probability: float, seed: int) -> float:
    """1.0 if this sample's backbone FAPE is clamped, else 0.0."""
    return 1.0 if random.Random(seed).uniform(0.0, 1.0) < probability else 0.0


@dataclass(frozen=True)
class Crop:
    """Residues [start, stop) of the chain and the kept templates, in order."""

    start: int
    stop: int
    templates: tuple[int, ...]


def draw_crop(length: int, num_templates: int, crop_size: int, max_templates: int, seed: int) -> Crop:
    """Training crop: template start, template order, residue start, drawn in this order from one generator.

    Without templates the first two are not drawn, so the residue start uses the first number of the stream.
    """
    stream = generator(seed)
    templates: tuple[int, ...] = ()
    if num_templates:
        first = int(torch.randint(0, num_templates + 1, (1,), generator=stream))
        order = torch.randperm(num_templates, generator=stream).tolist()
        templates = tuple(order[first : first + max_templates])
    size = min(crop_size, length)
    start = int(torch.randint(0, length - size + 1, (1,), generator=stream))
    return Crop(start, start + size, templates)


def permute_rows(num_rows: int, seed: int) -> np.ndarray:
    """int64 [num_rows]: row 0 first, then the others in random order."""
    others = torch.randperm(num_rows - 1, generator=generator(seed)) + 1
    return np.concatenate([np.zeros(1, dtype=np.int64), others.numpy()])


def choose_rows(num_rows: int, count: int, seed: int) -> np.ndarray:
    """int64 [min(num_rows, count)]: which of the extra rows are kept, in random order."""
    return torch.randperm(num_rows, generator=generator(seed))[:count].numpy()


@dataclass(frozen=True)
class MaskingRates:
    """How BERT-style masking of the alignment works (Supplement 1.2.7)."""

    replace_fraction: float = 0.15
    uniform_prob: float = 0.1
    profile_prob: float = 0.1
    same_prob: float = 0.1


def mask_rows(rows: np.ndarray, profile: np.ndarray, rates: MaskingRates, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace random positions; returns the masked rows uint8 [K, L] and which positions were chosen, bool [K, L].

    ``rows`` uint8 [K, L] residue types 0..21; ``profile`` float32 [L, 22]. The uniform field is drawn first, then one
    number per (position, class). The replacement is what ``torch.multinomial`` gives for one sample: the class with the
    largest ratio of probability to exponential draw, so only the chosen positions need probabilities and logarithms.
    """
    stream = generator(seed)
    chosen = torch.rand(rows.shape, generator=stream) < rates.replace_fraction
    words = torch.empty(rows.size, NUM_MSA_CLASSES, dtype=torch.int64).random_(generator=stream)
    where = torch.nonzero(chosen.flatten())[:, 0]
    original = torch.from_numpy(rows).flatten()[where].long()
    columns = where % rows.shape[1]
    probabilities = _replacement_probabilities(original, torch.from_numpy(profile)[columns], rates)
    replacement = torch.argmax((probabilities + _TINY_PROBABILITY) / _exponential(words[where]), dim=-1)
    masked = rows.copy().reshape(-1)
    masked[where.numpy()] = replacement.to(torch.uint8).numpy()
    return masked.reshape(rows.shape), chosen.numpy()


def _exponential(words: torch.Tensor) -> torch.Tensor:
    """float32 exponential draws from 64-bit random words, as torch's CPU generator makes them (53 bits, log1p)."""
    return -torch.log1p(-((words & _53_BITS).double() * 2.0**-53)).float()


def _replacement_probabilities(original: torch.Tensor, profile: torch.Tensor, rates: MaskingRates) -> torch.Tensor:
    """float32 [n, 23]: uniform over the 20 amino acids, the column's profile, the residue itself, the mask token."""
    uniform = torch.tensor([0.05] * 20 + [0.0, 0.0])
    same = torch.nn.functional.one_hot(original, NUM_MSA_CLASSES - 1)
    known = rates.uniform_prob * uniform + rates.profile_prob * profile + rates.same_prob * same
    mask_prob = 1.0 - rates.profile_prob - rates.same_prob - rates.uniform_prob
    return torch.nn.functional.pad(known, (0, 1), value=mask_prob)


class Alignment:
    """One chain's alignment, prepared once per sample and drawn from once per recycling slice.

    Args:
        msa: uint8 [S, L], HHblits ids (gap 21), row 0 first.
        deletions: unsigned integers [S, L], residues inserted before each position.
        counts: [L, 22], how many rows show each residue type in each column (stored with the alignment).
        crop: the residues that the sample keeps; masking and clustering use the whole length.
    """

    def __init__(self, msa: np.ndarray, deletions: np.ndarray, counts: np.ndarray, crop: Crop) -> None:
        self._msa = msa
        self._cropped = np.ascontiguousarray(msa[:, crop.start : crop.stop])
        self._cropped_deletions = np.ascontiguousarray(deletions[:, crop.start : crop.stop])
        self._deleted = np.nonzero(self._cropped_deletions)
        self._crop = crop
        self._profile = counts.astype(np.float32) / np.float32(len(msa))

    @cached_property
    def _matches(self) -> MatchTable:
        return MatchTable(self._msa)

    def draw_slice(self, max_clusters: int, max_extra: int, rates: MaskingRates, seed: int) -> "AlignmentSlice":
        """Choose, mask and cluster rows for one recycling slice (``seed`` already includes the slice)."""
        order = permute_rows(len(self._msa), seed)
        chosen, extra = order[:max_clusters], order[max_clusters:]
        original = residues.HHBLITS_TO_RESTYPE[self._msa[chosen]].astype(np.uint8)
        masked, was_masked = mask_rows(original, self._profile, rates, seed)
        profile, deletion_mean = self._summarise(chosen, extra, masked)
        kept = extra[choose_rows(len(extra), max_extra, seed)]
        columns = slice(self._crop.start, self._crop.stop)
        return AlignmentSlice(
            masked=masked[:, columns],
            original=original[:, columns],
            was_masked=was_masked[:, columns],
            deletions=self._cropped_deletions[chosen],
            cluster_profile=profile,
            cluster_deletion_mean=deletion_mean,
            extra=residues.HHBLITS_TO_RESTYPE[self._cropped[kept]],
            extra_deletions=self._cropped_deletions[kept],
        )

    def _summarise(self, chosen: np.ndarray, extra: np.ndarray, masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Profile float32 [K, C, 23] and mean deletion count [K, C] over each cluster and its centre."""
        num_clusters, columns = len(chosen), self._cropped.shape[1]
        counts = np.zeros((num_clusters, columns, NUM_MSA_CLASSES), dtype=np.float32)
        deletions = self._cropped_deletions[chosen].astype(np.float32)
        sizes = np.full(num_clusters, _COUNT_EPS + np.float32(1.0))  # in this order, as the reference rounds
        if len(extra):
            cluster = self._matches.nearest(_TO_HHBLITS[masked])
            members = cluster[extra]
            sizes += np.bincount(members, minlength=num_clusters).astype(np.float32)
            by_hhblits = count_classes(self._cropped[extra], members, num_clusters, GAP + 1)
            counts[..., residues.HHBLITS_TO_RESTYPE] = by_hhblits
            deletions += self._cluster_deletions(chosen, cluster, num_clusters)
        centre = masked[:, self._crop.start : self._crop.stop]
        counts[np.arange(num_clusters)[:, None], np.arange(columns), centre] += 1.0
        return counts / sizes[:, None, None], deletions / sizes[:, None]

    def _cluster_deletions(self, chosen: np.ndarray, cluster: np.ndarray, num_clusters: int) -> np.ndarray:
        """Deletion counts of each cluster's extra rows added up, float32 [K, C]; few positions have any."""
        is_extra = np.ones(len(self._msa), dtype=bool)
        is_extra[chosen] = False
        rows, columns = self._deleted
        used = is_extra[rows]
        rows, columns = rows[used], columns[used]
        width = self._cropped.shape[1]
        sums = np.bincount(
            cluster[rows] * width + columns,
            weights=self._cropped_deletions[rows, columns],
            minlength=num_clusters * width,
        )
        return sums.reshape(num_clusters, width).astype(np.float32)


_TO_HHBLITS = np.concatenate([residues.RESTYPE_TO_HHBLITS, [MASK_TOKEN]]).astype(np.uint8)


@dataclass(frozen=True)
class AlignmentSlice:
    """What one recycling slice sees of the alignment, over the C cropped residues; residue types, gap 21, mask 22."""

    masked: np.ndarray  # uint8 [K, C]
    original: np.ndarray  # uint8 [K, C]
    was_masked: np.ndarray  # bool [K, C]
    deletions: np.ndarray  # [K, C]
    cluster_profile: np.ndarray  # float32 [K, C, 23]
    cluster_deletion_mean: np.ndarray  # float32 [K, C]
    extra: np.ndarray  # int64 [E, C]
    extra_deletions: np.ndarray  # [E, C]


def deletion_value(count: np.ndarray) -> np.ndarray:
    """(2 / pi) arctan(count / 3), float32: deletion counts squeezed into [0, 1)."""
    value = np.zeros(count.shape, dtype=np.float32)
    some = count > 0
    value[some] = np.arctan(count[some].astype(np.float32) / np.float32(3.0)) * np.float32(2.0 / np.pi)
    return value
