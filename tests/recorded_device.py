"""A GPU and a compiler that know everything beforehand, for tests of the search for launch parameters."""

import math
from concurrent.futures import Future

from scalefold.kernels import tuning
from scalefold.tune.device import Outcome
from scalefold.tune.programs import Program
from scalefold.tune.trials import config_text

FIELDS: dict[str, int | str] = {"rows": 65536, "c": 128, "n": 512, "dtype": "bfloat16"}
KERNEL = "transition_forward"
PLANTED = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
PRESENT = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


def planted_us(config, best=None):
    """A smooth time with its least at the planted configuration."""
    best = best or PLANTED
    steps = sum(abs(math.log2(config[name] / best[name])) for name in best)
    return 100.0 * (1 + 0.08 * steps)


class Record:
    """A device that knows all times; ``bad`` texts give other bits in every repeat, ``fatal`` ones end the device."""

    works = True

    def __init__(self, us=planted_us, bad=(), dies_after=None, fatal=()):
        self.us, self.bad, self.dies_after, self.fatal = us, set(bad), dies_after, set(fatal)
        self.asked = []

    def inputs(self, case):
        return None

    def try_out(self, problem, config, repeats):
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked.append((config_text(config), repeats))
        if config_text(config) in self.fatal:
            self.works = False
            return Outcome(None, "", "AcceleratorError: an illegal memory access was encountered")
        return Outcome(self.us(config), "differ" if config_text(config) in self.bad else "equal", "")


class Compiled:
    """Processes that have compiled everything; ``unfit`` says why a configuration has no program, or that it spills."""

    slots = 4

    def __init__(self, unfit=lambda config: Program(registers=128, programs=1024)):
        self.unfit = unfit
        self.asked = []

    def submit(self, problem, config):
        self.asked.append(config_text(config))
        future = Future()
        future.set_result(self.unfit(config))
        return future

    def close(self):
        pass


def columns(kernel=KERNEL, problem=None, **changed):
    """First columns of trials."""
    key = problem or tuning.problem_key(FIELDS)
    facts = {"date": "d", "device": "NVIDIA H100 80GB HBM3", "torch": "t", "code": "c"}
    place = {"kernel": kernel, "problem": key, "operation": "transition", "dap": 1, "calls": 52, "operations": 10**9}
    return {**facts, **place, **changed}
