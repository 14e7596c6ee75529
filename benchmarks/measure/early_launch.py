"""Training step with programs that start while the kernel before them ends, and without: same bits, what time?

    python benchmarks/measure/early_launch.py                                   # apart, early, apart, early
    python benchmarks/measure/early_launch.py --forms apart wait store apart --passes 1 4

One process builds, captures, checks and times the step in one form after the other; forms may be repeated, which shows
the drift. Forms: ``apart``: every kernel after the end of the one before; ``early``: as the program launches them, the
next one's programs come when those of this one have ended; ``wait`` and ``store``: they may come as soon as every
program of this one has passed its wait, or has come to its first store. Compared are the bits of logged values,
gradients and all that the update changes, dropout on. Exit status 1 if they differ.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime.jit import JITFunction

import operation_cases
from common import facts, print_table, time_calls
from reproducibility import SEED, Beginning, digest, run_step
from scalefold.data.configured import feature_settings
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.parallel.ranks import prepare_process
from step_time import build, configuration
from tune import find_task, start_worker

FORMS = {"apart": False, "early": True, "wait": 2, "store": 3}  # the values tell them apart in Triton's keys


def use_form(form: str) -> None:
    """Launch all programs in this form from now on."""
    launch = getattr(JITFunction.run, "plain", JITFunction.run)

    def run(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        if options.pop("launch_pdl", False) and FORMS[form]:
            options["launch_pdl"] = FORMS[form]
        return launch(self, *arguments, **options)

    run.plain = launch  # type: ignore[attr-defined]
    JITFunction.run = run  # type: ignore[method-assign]


def know_all_forms() -> None:
    """Let what programs call also let their successors start, where the form says so."""
    wait, store = cuda.gdc_wait, tl.store

    def trigger(form: str, semantic: Any) -> None:
        if semantic.builder.options.launch_pdl == FORMS[form]:
            cuda.gdc_launch_dependents(_semantic=semantic)

    @tl.core.builtin
    def wait_and_trigger(_semantic: Any = None) -> None:
        wait(_semantic=_semantic)
        trigger("wait", _semantic)

    @tl.core.builtin
    def trigger_and_store(*arguments: Any, _semantic: Any = None, **named: Any) -> Any:
        trigger("store", _semantic)
        return store(*arguments, _semantic=_semantic, **named)

    cuda.gdc_wait, tl.store = wait_and_trigger, trigger_and_store


def start_form_worker(form: str) -> None:
    """State of a worker that compiles the operations in a form."""
    know_all_forms()
    use_form(form)
    start_worker([1], [])


def compile_form(form: str, workers: int) -> None:
    """Run every operation once in a pool of processes, whose kernels this one then finds in Triton's cache."""
    count, context = len(operation_cases.training_cases(1)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_form_worker, (form,)) as pool:
        list(pool.map(find_task, range(count)))


def measured(form: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row per number of passes: bits of the first step, and its time."""
    use_form(form)
    config, rows = configuration("ours", arguments.set), []
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device="cuda")
    _, step = build(config)
    step.warm_up(batch, max(arguments.passes), lambda text: None)
    beginning = Beginning.of(step.optimizer)
    for r in arguments.passes:
        beginning.restore()
        sha256 = digest(run_step(step, batch, r, SEED))
        timing = time_calls(lambda r=r: step(batch, r, 1), arguments.repeats)
        times = {name: round(value, 2) for name, value in vars(timing).items()}
        rows.append({**facts(), "form": form, "passes": r, **times, "sha256": sha256[:16]})
        print(f"{form} R={r}: {timing.median_ms:.2f} ms, bits {sha256[:16]}", flush=True)
    return rows


def main() -> int:
    """Measure the forms in turn; exit status 1 if one has other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["apart", "early"] * 2)
    parser.add_argument("--passes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile; 0: none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    for form in dict.fromkeys(arguments.forms if arguments.workers else []):
        compile_form(form, arguments.workers)
    prepare_process(configuration("ours", arguments.set))
    know_all_forms()
    rows: list[dict[str, object]] = []
    for form in arguments.forms:
        rows += measured(form, arguments)
        gc.collect()  # the graphs of this form, before the next one's
        torch.cuda.empty_cache()
    print_table(rows)
    different = {r for r in arguments.passes if len({row["sha256"] for row in rows if row["passes"] == r}) > 1}
    print(f"bits {'DIFFER for R = ' + str(sorted(different)) if different else 'are equal in all forms'}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
