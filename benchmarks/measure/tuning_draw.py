"""Draw the problems that ``tuning_sweeps.py --set drawn`` times, before anything is known of them.

    python benchmarks/measure/tuning_draw.py > benchmarks/measure/tuning_problems.csv      # no GPU

From everything that a GPU of compute capability 9.0 looks up with the present choices in training at DAP 1 to 8 and in
evaluation of some lengths: every kernel with FEWEST to MOST candidates gives up to OF_EACH problems that no sweep has
timed, drawn at random, of other widths than those before as long as the kernel has some. The first ones of all kernels
come first, in an order that is drawn too. Other tables of choices give another list: what was committed counts.
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

DAPS, LENGTHS = [1, 2, 4, 8], [256, 320, 448, 576, 704]
FEWEST, MOST = 24, 100
OF_EACH = 5
SEED = 23
SWEPT = ("tuning_sweeps.csv", "tuning_held_out.csv", "tuning_first_draw.csv")


def drawn(problems: list[Problem], seed: int) -> list[Problem]:
    """Up to OF_EACH problems of each kernel."""
    chance, by_kernel = random.Random(seed), []
    for kernel in sorted({problem.kernel for problem in problems}):
        own = sorted((p for p in problems if p.kernel == kernel), key=lambda p: p.key)
        chance.shuffle(own)
        chosen: list[Problem] = []
        while own and len(chosen) < OF_EACH:
            widths = [width_of(problem.fields) for problem in chosen]
            rarest = min(own, key=lambda problem: widths.count(width_of(problem.fields)))
            own.remove(rarest)
            chosen.append(rarest)
        by_kernel.append(chosen)
    chance.shuffle(by_kernel)
    return [chosen[turn] for turn in range(OF_EACH) for chosen in by_kernel if turn < len(chosen)]


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
