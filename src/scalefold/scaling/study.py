"""Many simulated runs of one planned system: how much the minutes spread, and where they go."""

from dataclasses import dataclass, fields
from statistics import mean

import numpy as np

from scalefold.errors import ConfigError
from scalefold.scaling.convergence import Basis, Convergence, samples_to_converge
from scalefold.scaling.plan import Assumptions, Plan
from scalefold.scaling.simulate import Loader, Noise, Simulation, draw_cycles, simulate_many
from scalefold.scaling.system import SystemSpec


@dataclass(frozen=True)
class Study:
    """Simulated runs of one system; each converges after its own number of cycles."""

    name: str
    noise: Noise
    convergence: Convergence
    runs: list[Simulation]
    warnings: list[str]

    @property
    def minutes(self) -> np.ndarray:
        """Time to train of every run, float64 [runs]."""
        return np.array([run.minutes for run in self.runs])

    @property
    def score_minutes(self) -> float:
        """Mean without the fastest and the slowest run, as MLPerf scores ten runs."""
        ordered = np.sort(self.minutes)
        return float((ordered[1:-1] if len(ordered) > 2 else ordered).mean())

    def mean_parts(self) -> dict[str, float]:
        """Mean seconds of every part of a run."""
        return {name: mean(run.parts[name] for run in self.runs) for name in self.runs[0].parts}

    def text(self) -> str:
        """Spread, parts, the assumptions behind them and the warnings of the plan."""
        low, median, high = np.percentile(self.minutes, [5, 50, 95])
        head = f"{self.name}: {len(self.runs)} simulated runs, mean without extremes {self.score_minutes:.2f} min"
        lines = [f"{head}; 5 % {low:.2f}, median {median:.2f}, 95 % {high:.2f}"]
        total = 60 * float(self.minutes.mean())
        parts = {name: seconds for name, seconds in self.mean_parts().items() if abs(seconds) > 0.05}
        lines += [f"  {name:<28}{seconds:>10.1f} s{100 * seconds / total:>7.1f} %" for name, seconds in parts.items()]
        lines.append(f"  failures per run: {mean(run.num_failures for run in self.runs):.2f}")
        lines.append(f"  assumed: convergence {self.convergence.source}; {_settings(self.noise)}")
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def usual_noise(spec: SystemSpec, assumptions: Assumptions = Assumptions()) -> Noise:
    """Disturbances to expect on a healthy machine: assumptions, printed with every study.

    One rank's step time spreads by 1 %; one step in a million per rank loses a second; samples take the plan's
    core-seconds, one in a thousand ten times as long. No failures: a run of minutes that fails is started again.
    """
    loader = Loader(max(spec.num_workers, 1), assumptions.core_s_per_sample, slow_fraction=1e-3, slow_factor=10.0)
    return Noise(straggler_sigma=0.01, hiccup_rate=1e-6, hiccup_s=1.0, loader=loader)


def study(
    plan: Plan,
    noise: Noise = Noise(),
    *,
    runs: int = 10,
    seed: int = 0,
    convergence: Basis = "reference",
    extrapolate: bool = False,
) -> Study:
    """Simulate ``runs`` runs of a planned system, each with a number of cycles drawn from observed convergence.

    Raises ConfigError if the plan is open: then nobody knows the step time, the evaluation time or the convergence.
    """
    if plan.times is None:
        reason = plan.quantities["time to train"].source
        raise ConfigError(f"{plan.spec.name}: cannot be simulated, its plan is open: {reason}")
    if runs < 1:
        raise ConfigError(f"runs {runs}: must be at least 1")
    spec = plan.spec
    known = samples_to_converge(spec.global_batch_size * spec.gradient_accumulation_steps, convergence, extrapolate)
    per_cycle = spec.global_batch_size * spec.val_every_iters
    cycles = draw_cycles(known.mean_samples, known.sd_samples, per_cycle, runs, seed)
    return Study(spec.name, noise, known, simulate_many(plan.times, noise, cycles, seed), plan.warnings)


def _settings(noise: Noise) -> str:
    """All settings of the noise that differ from no noise, as ``name value``."""
    quiet = Noise()
    parts = [f"{f.name} {getattr(noise, f.name):g}" for f in fields(noise) if f.name != "loader"]
    quiet_parts = {f"{f.name} {getattr(quiet, f.name):g}" for f in fields(quiet) if f.name != "loader"}
    shown = [part for part in parts if part not in quiet_parts]
    if noise.loader is not None:
        shown += [f"loader {f.name} {getattr(noise.loader, f.name)}" for f in fields(noise.loader)]
    return ", ".join(shown) or "no disturbances"
