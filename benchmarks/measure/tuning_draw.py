"""Draw the problems that ``tuning_sweeps.py --set drawn`` times, before anything is known of them.

    python benchmarks/measure/tuning_draw.py > benchmarks/measure/tuning_drawn.csv      # no GPU

From everything that a GPU of compute capability 9.0 looks up with the present choices in training at DAP 2, 4 and 8 and
in evaluation of 320 and 704 residues: every kernel with FEWEST to MOST candidates gives two problems that no sweep has
timed, drawn at random, the second of another width than the first where the kernel has one. The first ones of all
kernels come first, in an order that is drawn too. Other tables of choices give another list: the file that was
committed counts.
"""

import csv
import random
import sys

from common import FOLDER
from scalefold.tune import trials
from scalefold.tune.candidates import space
from scalefold.tune.command import unique_problems
from scalefold.tune.programs import Problem, all_cases
from tuning_methods import width_of

DAPS, LENGTHS = [2, 4, 8], [320, 704]
FEWEST, MOST = 24, 100
SEED = 22
SWEPT = ("tuning_sweeps.csv", "tuning_held_out.csv")


def drawn(problems: list[Problem], seed: int) -> list[Problem]:
    """Two problems of each kernel, or the one that it has."""
    chance, pairs = random.Random(seed), []
    for kernel in sorted({problem.kernel for problem in problems}):
        own = sorted((p for p in problems if p.kernel == kernel), key=lambda p: p.key)
        chance.shuffle(own)
        pairs.append([own[0], *sorted(own[1:], key=lambda p: width_of(p.fields) == width_of(own[0].fields))[:1]])
    chance.shuffle(pairs)
    return [pair[turn] for turn in range(2) for pair in pairs if turn < len(pair)]


def main() -> int:
    """Write the list to standard output."""
    cases = all_cases(DAPS, LENGTHS)
    swept = {trial.key for name in SWEPT for trial in trials.read(FOLDER / name)}
    fresh = [p for p in unique_problems(cases) if p.key not in swept]
    wanted = [p for p in fresh if FEWEST <= len(space(p.kernel, p.fields)) <= MOST]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("kernel", "problem", "operation", "candidates"))
    for problem in drawn(wanted, SEED):
        size = len(space(problem.kernel, problem.fields))
        writer.writerow((*problem.key, cases[problem.case].name, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
