"""Kernels as compilers make them: compiled ahead of a run, and looked through for what makes their results wrong.

No GPU is needed: ``rings`` and ``in_place`` read a kernel in Triton's GPU dialect, ``machine_code`` its instructions.
"""

from scalefold.kernels.compiled.in_place import unordered_accesses
from scalefold.kernels.compiled.machine_code import unwritten_reads
from scalefold.kernels.compiled.rings import ring_faults, unguarded_refills


def faults(ttgir: str, ptx: str, listing: str, num_warps: int) -> list[str]:
    """Everything that makes results of a compiled kernel wrong, one line each; listing: of ``disassembled``."""
    in_dialect = ring_faults(ttgir) + unordered_accesses(ttgir)
    return in_dialect + unguarded_refills(ptx, num_warps) + unwritten_reads(listing)
