"""Which cluster centre each alignment row resembles most, counted exactly in integers (numpy).

The definition is a matrix product of one-hot rows: 2 GB of floats for 25,000 rows of 900 columns, repeated for every
recycling slice. Here the alignment becomes one bit per (residue class, column, row) once per sample; the matches of
64 rows with a centre are then added up at a time by a bit-sliced adder. For 20,000 rows of 500 columns this takes
0.12 s per slice on one core, byte comparisons take 0.25 s and the float product of one-hots 5.5 s
(benchmarks/measure/cluster_matching.py).
"""

import numpy as np

NUM_MATCHED_CLASSES = 21  # 20 amino acids and X; gap and mask token never match
GAP = 21
_ROW_BLOCK = 512  # rows transposed at a time; keeps source and target in the cache
_WORDS_PER_STEP = 320  # words that one numpy call works on; below this its overhead dominates


class MatchTable:
    """Bit masks of an alignment: for each class and column, one bit per row.

    Args:
        msa: uint8 [S, L], ids 0..21 of any alphabet whose gap is 21.
    """

    def __init__(self, msa: np.ndarray) -> None:
        self.num_rows, self.num_columns = msa.shape
        bits = _bit_planes(msa)
        self._words = bits.shape[-1]
        self._masks = _class_masks(bits)  # [22, L, words]; the last class stays empty

    def nearest(self, centres: np.ndarray) -> np.ndarray:
        """int64 [S]: for each row the centre with most equal residues, the first one on ties.

        ``centres`` uint8 [K, L] in the alphabet of the alignment; ids of 21 and more match nothing.
        """
        words, columns = self._words, np.arange(self.num_columns)
        picks = np.minimum(centres, GAP).astype(np.int64) * self.num_columns + columns  # [K, L]
        masks = self._masks.reshape(-1, words)
        best = np.zeros((self.num_columns.bit_length(), words), dtype=np.uint64)
        index = np.zeros((max(len(centres) - 1, 1).bit_length(), words), dtype=np.uint64)
        step = max(1, _WORDS_PER_STEP // words)
        for first in range(0, len(centres), step):
            batch = picks[first : first + step].T  # [L, k]
            if step == 1:
                batch = batch[centres[first] < GAP]  # empty masks: skipping them is worth it for many rows only
            matches = masks[batch].reshape(len(batch), -1)
            counts = np.zeros((len(best), batch.shape[1], words), dtype=np.uint64)
            for bit, plane in enumerate(_add_bits(matches)):
                counts[bit] = plane.reshape(-1, words)
            for k in range(batch.shape[1]):
                _keep_larger(best, index, counts[:, k], first + k)
        return _integers(index, self.num_rows)


def _bit_planes(msa: np.ndarray) -> np.ndarray:
    """uint64 [5, L, words]: the binary digits of every id, 64 rows in a word; padding rows have id 31."""
    rows, columns = msa.shape
    words = max(1, -(-rows // 64))
    flipped = np.full((columns, words * 64), 31, dtype=np.uint8)
    for first in range(0, rows, _ROW_BLOCK):
        block = msa[first : first + _ROW_BLOCK]
        flipped[:, first : first + len(block)] = block.T
    planes = np.empty((5, columns, words * 8), dtype=np.uint8)
    for column in range(0, columns, 16):
        block = flipped[column : column + 16]
        for bit in range(5):
            planes[bit, column : column + 16] = np.packbits(block & (1 << bit), axis=1, bitorder="little")
    return planes.view(np.uint64)


def _class_masks(planes: np.ndarray) -> np.ndarray:
    """uint64 [22, L, words]: all five digits agree with the class."""
    inverted = ~planes
    masks = np.zeros((NUM_MATCHED_CLASSES + 1, *planes.shape[1:]), dtype=np.uint64)
    for high in range(-(-NUM_MATCHED_CLASSES // 4)):
        common = [(planes if high >> bit & 1 else inverted)[bit + 2] for bit in range(3)]
        upper = common[0] & common[1] & common[2]
        for label in range(4 * high, min(4 * high + 4, NUM_MATCHED_CLASSES)):
            np.bitwise_and(upper, (planes if label & 1 else inverted)[0], out=masks[label])
            masks[label] &= (planes if label & 2 else inverted)[1]
    return masks


def _add_bits(addends: np.ndarray) -> list[np.ndarray]:
    """Binary digits (lowest first) of the sum over the first axis of one-bit numbers, for every bit of the words.

    Full adders turn three addends of equal weight into a sum and a carry. Works in place: ``addends`` is destroyed.
    """
    digits, scratch = [], np.empty_like(addends[: len(addends) // 3])
    while True:
        carries = []
        while (third := len(addends) // 3) > 0:
            a, b, c, half = addends[:third], addends[third : 2 * third], addends[2 * third : 3 * third], scratch[:third]
            np.bitwise_xor(a, b, out=half)
            np.bitwise_and(a, b, out=b)
            np.bitwise_and(half, c, out=a)
            np.bitwise_xor(half, c, out=c)
            np.bitwise_or(a, b, out=a)
            carries.append(a)
            addends = addends[2 * third :]  # the sums in c, and what was left over
        if len(addends) == 2:
            carries.append((addends[0] & addends[1])[None])
            addends = (addends[0] ^ addends[1])[None]
        digits.append(addends[0])
        if not carries:
            return digits
        addends = np.concatenate(carries) if len(carries) > 1 else carries[0]


def _keep_larger(best: np.ndarray, index: np.ndarray, counts: np.ndarray, candidate: int) -> None:
    """Where the number in ``counts`` exceeds ``best`` (both bit-sliced), take it and write ``candidate``."""
    differs = best ^ counts
    larger_here = counts & differs
    equal = ~differs
    larger = larger_here[0]
    for bit in range(1, len(best)):
        larger = larger_here[bit] | (larger & equal[bit])
    best ^= differs & larger
    index &= ~larger
    for bit in range(len(index)):
        if candidate >> bit & 1:
            index[bit] |= larger


def _integers(planes: np.ndarray, num_rows: int) -> np.ndarray:
    """int64 [num_rows] from bit-sliced numbers."""
    numbers = np.zeros(num_rows, dtype=np.int64)
    for bit, plane in enumerate(planes):
        numbers |= np.unpackbits(plane.view(np.uint8), bitorder="little")[:num_rows].astype(np.int64) << bit
    return numbers


def count_classes(msa: np.ndarray, cluster: np.ndarray, num_clusters: int, num_classes: int) -> np.ndarray:
    """int64 [num_clusters, C, num_classes]: how often each class occurs among the rows of each cluster.

    ``msa`` uint8 [S, C] ids below ``num_classes``; ``cluster`` int [S], the cluster of each row.
    """
    columns = msa.shape[1]
    order = np.argsort(cluster, kind="stable")
    ends = np.cumsum(np.bincount(cluster, minlength=num_clusters))
    rows, base = msa[order], np.arange(columns) * num_classes
    counts = np.zeros((num_clusters, columns * num_classes), dtype=np.int64)
    for k, end in enumerate(ends):
        start = ends[k - 1] if k else 0
        if end > start:
            counts[k] = np.bincount((rows[start:end] + base).ravel(), minlength=counts.shape[1])
    return counts.reshape(num_clusters, columns, num_classes)
