"""In-process aligners against the reference's re-alignment: ``python benchmarks/measure/template_aligners.py
PAIRS.json``.

PAIRS.json holds pairs of real chains with the aligned rows, decision and residue map of the reference (its external
aligner). gemmi is what ``scalefold.data.raw.align`` uses; kalign-python and parasail are compared if they are
installed. Rows go to ``benchmarks/results/template_aligners.csv``.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from common import FOLDER, append_rows, facts, print_table
from scalefold.data.raw.align import MIN_IDENTITY, global_alignment

Aligner = Callable[[str, str], tuple[str, str]]


def aligners() -> dict[str, Aligner]:
    """Candidates by name; those that are not installed are left out."""
    found: dict[str, Aligner] = {"gemmi BLOSUM62 10/1": global_alignment}
    try:
        kalign = importlib.import_module("kalign")
        for mode in ("fast", "default", "accurate"):
            found[f"kalign-python {mode}"] = lambda a, b, mode=mode: tuple(
                kalign.align([a, b], seq_type="protein", mode=mode, n_threads=1)
            )
        gaps = {"gap_open": 5.5, "gap_extend": 2.0, "terminal_gap_extend": 1.0}
        found["kalign-python 5.5/2/1"] = lambda a, b: tuple(
            kalign.align([a, b], seq_type="protein", n_threads=1, **gaps)
        )
    except ImportError:
        print("kalign-python is not installed")
    try:
        parasail = importlib.import_module("parasail")

        def with_parasail(first: str, second: str) -> tuple[str, str]:
            traceback = parasail.nw_trace_striped_16(first, second, 11, 1, parasail.blosum62).traceback
            return traceback.query, traceback.ref

        found["parasail nw BLOSUM62 11/1"] = with_parasail
    except ImportError:
        print("parasail is not installed")
    return found


def mapping(old: str, new: str) -> list[int]:
    """Index in ``new`` of each letter of ``old``, -1 opposite a gap."""
    found, at = [], -1
    for a, b in zip(old, new, strict=True):
        at += b != "-"
        if a != "-":
            found.append(at if b != "-" else -1)
    return found


def compare(name: str, align: Aligner, pairs: list[dict]) -> dict[str, object]:
    """Agreement with the reference over all pairs."""
    decisions = maps = accepted_maps = accepted = same_residues = residues = 0
    started = time.process_time()
    for pair in pairs:
        old, new = align(pair["old"], pair["new"])
        identical = sum(a == b != "-" for a, b in zip(old, new, strict=True))
        decision = identical / min(len(pair["old"]), len(pair["new"])) >= MIN_IDENTITY
        found, expected = mapping(old, new), mapping(*pair["aligned"])
        decisions += decision == pair["accepted"]
        maps += found == expected
        same_residues += sum(a == b for a, b in zip(found, expected, strict=True))
        residues += len(expected)
        if pair["accepted"]:
            accepted += 1
            accepted_maps += found == expected
    return {
        **facts(),
        "aligner": name,
        "same_decision": f"{decisions}/{len(pairs)}",
        "same_map_of_accepted": f"{accepted_maps}/{accepted}",
        "same_map_of_all": f"{maps}/{len(pairs)}",
        "same_residues": same_residues / residues,
        "cpu_ms_per_pair": 1e3 * (time.process_time() - started) / len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    pairs = json.loads(parser.parse_args().pairs.read_text())
    rows = [compare(name, align, pairs) for name, align in aligners().items()]
    print_table(rows)
    append_rows(FOLDER / "template_aligners.csv", rows)


if __name__ == "__main__":
    main()
