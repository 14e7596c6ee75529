"""Hours of training from random weights, in phases of growing batches.

Nobody has measured such a run of this program. The plan takes the numbers of steps that are reported of ScaleFold's
(arXiv 2404.11068; no log of it is published) and the step and evaluation times of each phase's ranks. Left out are
queues, starts of jobs, failures and stragglers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalefold.errors import ConfigError
from scalefold.scaling.plan import Assumptions, Plan, Quantity
from scalefold.scaling.system import SystemSpec

RECIPE = "as reported of ScaleFold, arXiv 2404.11068"
GOAL = (128, 0.8)  # batch and lDDT-Cα of the reported first phase
STEPS_TO_GOAL = 5_000
STEPS_IN_ALL = (50_000, 60_000)
PUBLISHED_H = 10.0
ALPHAFOLD_H = 7 * 24.0


@dataclass(frozen=True)
class Phase:
    """A part of a run: its ranks and batch, and where it ends, at whatever comes first."""

    name: str
    spec: SystemSpec
    until_step: int | None
    until_lddt_ca: float | None


def steps_of(phases: Sequence[Phase], in_all: int) -> list[int]:
    """Steps of each phase of a run of ``in_all``.

    Raises:
        ConfigError: naming the phase whose end nobody knows.
    """
    ends = [min(_end(phase), in_all) for phase in phases[:-1]] + [in_all]
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _end(phase: Phase) -> int:
    """The step after which a phase that is not the last one ends."""
    reported = [STEPS_TO_GOAL] if (phase.spec.global_batch_size, phase.until_lddt_ca) == GOAL else []
    known = reported + ([phase.until_step] if phase.until_step is not None else [])
    if not known:
        raise ConfigError(f"phase {phase.name}: nobody knows its end; set until_step (known: lDDT-Ca 0.8 at batch 128)")
    return min(known)


def with_hours(whole: Plan, phases: Sequence[Phase], plans: Sequence[Plan]) -> Plan:
    """The plan of a run with the hours of its phases; ``plans`` are those of the phases' ranks."""
    found = dict(whole.quantities)

    def put(name: str, value: float | None, unit: str, source: str) -> None:
        found[name] = Quantity(name, value, unit, source)

    try:
        counts = [steps_of(phases, in_all) for in_all in STEPS_IN_ALL]
    except ConfigError as error:
        put("hours from scratch", None, "h", str(error))
        return replace(whole, quantities=found)
    hours = [0.0, 0.0]
    for phase, planned, least, most in zip(phases, plans, *counts, strict=True):
        each_s, source = _seconds_per_step(planned)
        spec = phase.spec
        layout = f"{spec.world_size} ranks = {spec.dp_size} x DAP-{spec.dap_size} + {spec.num_eval_ranks}"
        beyond = "" if least == most else f"to {most:,}; "
        put(f"{phase.name}: steps", least, "", f"{beyond}batch {spec.global_batch_size}, {layout}")
        put(f"{phase.name}: step with evaluation", None if each_s is None else 1000 * each_s, "ms", source)
        hours = [h + (each_s or float("nan")) * n / 3600 for h, n in zip(hours, (least, most), strict=True)]
    known = hours[0] == hours[0]  # not NaN
    steps = f"{RECIPE}: {STEPS_TO_GOAL:,} steps at batch 128 to lDDT-Ca 0.8, {STEPS_IN_ALL[0]:,} to {STEPS_IN_ALL[1]:,}"
    put("hours from scratch, fewest steps", hours[0] if known else None, "h", f"{steps} in all")
    left_out = "queues, starts of jobs, failures and stragglers left out"
    put("hours from scratch, most steps", hours[1] if known else None, "h", left_out)
    put("published", PUBLISHED_H, "h", "ScaleFold from scratch on up to 2,080 H100 (its abstract)")
    put("AlphaFold", ALPHAFOLD_H, "h", "initial training on 128 TPUs, 7 days (same abstract)")
    warnings = [
        f"{phase.name}: {text}" for phase, planned in zip(phases, plans, strict=True) for text in planned.warnings
    ]
    return replace(whole, quantities=found, warnings=list(dict.fromkeys([*whole.warnings, *warnings])))


def _seconds_per_step(planned: Plan) -> tuple[float | None, str]:
    """Seconds of a step with its share of what a cycle costs besides, and where they come from."""
    step_ms, evaluation_s = planned.value("step time"), planned.value("evaluation")
    if step_ms is None or evaluation_s is None:
        missing = "step time" if step_ms is None else "evaluation"
        return None, planned.quantities[missing].source
    spec, hand_over_s = planned.spec, Assumptions().hand_over_s
    cycle_s = spec.val_every_iters * step_ms / 1000
    if spec.num_eval_ranks:
        whole_s, beside = max(cycle_s, evaluation_s) + hand_over_s, f"hand-over {hand_over_s:g} s"
    else:
        whole_s, beside = cycle_s + evaluation_s, f"evaluation {evaluation_s:.3g} s"
    source = f"{beside} every {spec.val_every_iters} steps; {planned.quantities['step time'].source}"
    return whole_s / spec.val_every_iters, source
