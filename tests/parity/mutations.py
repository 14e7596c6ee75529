"""Plants defects, one at a time in each copy of the package, and shows that a test catches each.

PYTHONPATH=tests python -m parity.mutations
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from conftest import REPOSITORY, find_shared
from scalefold.processors import processors

TESTS_FAILED = 1  # pytest's exit status; anything else is not a test that failed


@dataclass(frozen=True)
class Mutation:
    """One defect: in ``file`` the text ``old``, which occurs once, becomes ``new``; ``test`` must notice."""

    title: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "clusters are summarised before masking instead of after it",
        "data/features/transforms.py",
        "self._summarise(chosen, extra, masked)",
        "self._summarise(chosen, extra, original)",
        "test_features.py::test_benchmark_sizes_equal_the_plain_definition",
    ),
    Mutation(
        "triangle multiplication drops the mask of one operand",
        "kernels/reference.py",
        "F.linear(normed, weight_b, bias_b) * keep",
        "F.linear(normed, weight_b, bias_b)",
        "test_model_modules.py::test_module_and_its_gradients_equal_the_reference[tri_mul_out]",
    ),
    Mutation(
        "outer product mean divides with a wrong eps",
        "model/evoformer.py",
        "OUTER_PRODUCT_EPS = 1e-3",
        "OUTER_PRODUCT_EPS = 1e-5",
        "test_model_whole.py::test_all_outputs_equal_the_reference[r0]",
    ),
    Mutation(
        "the pair bias of row attention is transposed",
        "model/msa.py",
        "self.end_gather_bias(bias).permute(0, 3, 1, 2)",
        "self.end_gather_bias(bias).permute(0, 3, 2, 1)",
        "test_model_modules.py::test_module_and_its_gradients_equal_the_reference[msa_row_att]",
    ),
    Mutation(
        "attention around the ending node forgets to transpose its mask",
        "model/triangle.py",
        "attention(z.transpose(1, 2), mask.transpose(1, 2), dropout)",
        "attention(z.transpose(1, 2), mask, dropout)",
        "test_model_properties.py::test_masked_edges_have_no_influence_on_triangle_attention[ending]",
    ),
    Mutation(
        "rotations are not detached between structure iterations",
        "model/structure.py",
        "quaternion = quaternion.detach()",
        "quaternion = quaternion + 0.0",
        "test_model_whole.py::test_stored_gradients_equal_the_reference[r0]",
    ),
    Mutation(
        "recycled distances below the first edge fall into the first bin",
        "model/embedders.py",
        "(distance_sq > edges) & (distance_sq < upper)",
        "(distance_sq > edges * (torch.arange(RECYCLING_BINS) > 0)) & (distance_sq < upper)",
        "test_model_embedders.py::test_recycling_bins_are_open_intervals[3.0-None]",
    ),
    Mutation(
        "dropout of pair rows is drawn per row instead of shared by them",
        "model/layers.py",
        "(x.shape[0], 1, x.shape[2], x.shape[3])",
        "(x.shape[0], x.shape[1], 1, x.shape[3])",
        "test_model_properties.py::test_dropout_of_templates_and_samples_is_drawn_independently",
    ),
    Mutation(
        "lDDT-Cα is averaged over residues instead of pooled over pairs",
        "model/metrics.py",
        "return _share(score.sum((-1, -2)), counted.sum((-1, -2)))",
        "return lddt_ca_per_residue(predicted, true, mask).mean(-1)",
        "test_metrics.py::test_score_is_pooled_over_pairs_not_averaged_over_residues",
    ),
    Mutation(
        "Adam adds eps before the bias correction instead of after it",
        "kernels/reference.py",
        "exp_avg_sq.sqrt().div_(correction_2_sqrt).add_(eps)",
        "exp_avg_sq.sqrt().add_(eps).div_(correction_2_sqrt)",
        "test_optim.py::test_five_steps_equal_torch_adam_with_clipping_and_averaging",
    ),
    Mutation(
        "the last chain is dropped from the mean lDDT-Cα",
        "eval/score.py",
        "return sum(self.chains.values()) / len(self.chains)",
        "return sum(list(self.chains.values())[:-1]) / max(1, len(self.chains) - 1)",
        "test_evaluation.py::test_the_score_is_the_plain_mean_over_all_chains",
    ),
    Mutation(
        "a chain that two ranks scored passes",
        "eval/score.py",
        "if len(pairs) != len(scores) or set(scores) != set(expected):",
        "if set(scores) != set(expected):",
        "test_evaluation.py::test_a_chain_that_two_ranks_scored_is_refused",
    ),
    Mutation(
        "a score that is NaN passes",
        "eval/score.py",
        "if not 0.0 <= value <= 1.0 + 1e-6]",
        "if value < 0.0 or value > 1.0 + 1e-6]",
        "test_evaluation.py::test_a_score_that_is_missing_foreign_or_impossible_is_refused[nan]",
    ),
    Mutation(
        "chains are placed by length instead of its square",
        "eval/score.py",
        "loads[target] += lengths[chain] ** 2",
        "loads[target] += lengths[chain]",
        "test_evaluators.py::test_chains_are_placed_by_cost_longest_first_and_the_same_on_every_rank",
    ),
    Mutation(
        "`skip` drops the newest snapshot",
        "eval/snapshots.py",
        "dropped = self._queue.popleft()",
        "dropped = self._queue.pop()",
        "test_evaluation.py::test_skip_drops_the_oldest_waiting_snapshot_and_says_so",
    ),
    Mutation(
        "a snapshot is no copy of the weights",
        "eval/snapshots.py",
        "averaged.detach().clone()",
        "averaged.detach()",
        "test_evaluation.py::test_a_snapshot_holds_the_weights_as_of_its_step",
    ),
    Mutation(
        "a snapshot is sent while another is on its way",
        "eval/snapshots.py",
        "if not self._queue or self._flight is not None or not self.store.check",
        "if not self._queue or not self.store.check",
        "test_evaluation.py::test_nothing_is_sent_while_another_snapshot_is_on_its_way",
    ),
    Mutation(
        "one shared slot instead of three",
        "data/loading/shared_loader.py",
        "NUM_SLOTS = 3",
        "NUM_SLOTS = 1",
        "test_shared_loader.py::test_a_batch_stays_while_the_next_two_arrive",
    ),
    Mutation(
        "the end of a run forgets the evaluator",
        "run/assemble.py",
        '    ending.add("evaluation workers", evaluator.close)\n',
        "",
        "test_evaluation.py::test_a_run_lets_go_of_its_evaluator",
    ),
    Mutation(
        "the loop does not look at its evaluation",
        "run/loop.py",
        "reached = run.evaluator.submit(step)",
        "run.evaluator.submit(step)",
        "test_train.py::test_a_run_ends_with_a_log_a_record_and_its_configuration",
    ),
    Mutation(
        "dropout seeds count from the start of the process",
        "run/loop.py",
        "forward_seed(run.start.seed, run.ranks.dp_index, step)",
        "forward_seed(run.start.seed, run.ranks.dp_index, step - run.start.first_step)",
        "test_train.py::test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit",
    ),
    Mutation(
        "a resumed run repeats its last step",
        "run/resume.py",
        "return self.state.iteration + 1 if self.state else 1",
        "return self.state.iteration if self.state else 1",
        "test_train.py::test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit",
    ),
    Mutation(
        "a stop inside gradient accumulation does not wait for the update",
        "run/stops.py",
        "return step % self.schedule.config.training.gradient_accumulation_steps == 0",
        "return True",
        "test_resume.py::test_a_stop_inside_gradient_accumulation_waits_for_the_update",
    ),
    Mutation(
        "a resume takes a checkpoint without looking at its hash",
        "step/checkpoint.py",
        "elif sha256_of(folder / name) != state.sha256[name]:",
        "elif not state.sha256[name]:",
        "test_resume.py::test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_named",
    ),
    Mutation(
        "a checkpoint gets its name before it is on the disk",
        "step/checkpoint_writer.py",
        "    flush(temporary)\n    if target.exists():",
        "    if target.exists():",
        "test_checkpoint.py::test_files_reach_the_disk_before_the_name_does",
    ),
    Mutation(
        "a resume forgets how many updates the average holds",
        "step/checkpoint.py",
        "    optimizer.num_averaged = state.num_averaged\n    return state",
        "    return state",
        "test_train.py::test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit",
    ),
    Mutation(
        "warm-up does not put the averages back",
        "step/graphs.py",
        "buffers = (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged)\n    saved",
        "buffers = (flat.master, optimizer.exp_avg, optimizer.exp_avg_sq)\n    saved",
        "test_step.py::test_warm_up_puts_every_bit_back_and_leaves_no_gradient",
    ),
    Mutation(
        "two training cycles may be open in a log",
        "mlperf/log/events.py",
        "if self._open_epoch is not None:",
        "if self._open_epoch == step:",
        "test_mlperf_events.py::test_an_illegal_order_is_refused",
    ),
    Mutation(
        "a run that fails is logged as a success",
        "mlperf/log/events.py",
        'self._log("INTERVAL_END", "run_stop", None, {"status": "aborted"})',
        'self._log("INTERVAL_END", "run_stop", None, {"status": "success"})',
        "test_mlperf_events.py::test_abort_stops_a_running_clock_once",
    ),
    Mutation(
        "parts of a log are joined without order",
        "mlperf/log/events.py",
        "    lines.sort(key=lambda line: line.time_ms)\n",
        "",
        "test_mlperf_events.py::test_two_roots_of_an_asynchronous_run_give_one_log_in_time_order",
    ),
    Mutation(
        "a clock that is set back turns the log back",
        "mlperf/log/events.py",
        "return lambda: (offset_ns + time.monotonic_ns()) // 1_000_000",
        "return lambda: time.time_ns() // 1_000_000 + 0 * offset_ns",
        "test_mlperf_events.py::test_stamps_go_on_when_the_system_clock_is_set_back",
    ),
    Mutation(
        "a full disk leaves half a line",
        "textfile.py",
        "os.ftruncate(file_descriptor, size)",
        "pass",
        "test_mlperf_events.py::test_a_full_disk_leaves_no_half_line",
    ),
    Mutation(
        "a resumed record drops the step it resumes from",
        "report/record.py",
        'if e["kind"] == "run" or _number(e.get("step", step)) <= step]',
        'if e["kind"] == "run" or _number(e.get("step", step)) < step]',
        "test_report_record.py::test_a_resumed_run_drops_exactly_the_steps_that_will_be_repeated",
    ),
    Mutation(
        "draws that were passed over are forgotten",
        "data/loading/loader.py",
        "self._passed_over.update(range(self._newest + 1, draw))",
        "self._passed_over.update(())",
        "test_loader.py::test_draws_passed_over_by_one_loader_are_the_first_of_the_next",
    ),
    Mutation(
        "the loader delivers another iteration than was asked for",
        "data/loading/loader.py",
        "if self._in_order and batch.iteration != iteration:",
        "if self._in_order and batch.iteration > iteration:",
        "test_loader.py::test_only_the_announced_iterations_are_delivered_and_in_their_order",
    ),
    Mutation(
        "of the ready batches the latest draw comes first",
        "data/loading/loader.py",
        "heapq.heappush(self._ready, (batch.iteration, batch))",
        "heapq.heappush(self._ready, (-batch.iteration, batch))",
        "test_loader.py::test_of_the_ready_batches_the_earliest_draw_comes_first",
    ),
    Mutation(
        "evaluation features depend on the order of the chains",
        "data/loading/loader.py",
        "(seed_from_string(chain_id),)",
        "(number,)",
        "test_loader.py::test_evaluation_features_depend_on_the_chain_alone_and_are_built_once",
    ),
    Mutation(
        "replicas draw the same samples",
        "data/loading/sampler.py",
        "places = (replica + self._num_replicas * (first + j) for",
        "places = (self._num_replicas * (first + j) for",
        "test_sampler.py::test_replicas_share_the_global_stream_without_overlap",
    ),
    Mutation(
        "a resume passes over what the loader had left over",
        "data/loading/sampler.py",
        "return sorted([*missing, *self._left_over[drawn:]])",
        "return sorted(missing)",
        "test_sampler.py::test_whatever_is_passed_over_comes_first_after_the_next_start",
    ),
    Mutation(
        "workers that are alive and slow are called dead",
        "data/loading/waiting.py",
        "    if standing:",
        "    if not standing:",
        "test_loader.py::test_workers_that_are_alive_and_slow_are_not_called_dead",
    ),
)


class Workshop:
    """A copy of the package, its tests and what they read, in which defects can be planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "src" / "scalefold"
        folder.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
        for name in ("src", "tests", "configs"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
        shutil.copy(REPOSITORY / "pyproject.toml", folder)

    def run(self, *tests: str) -> subprocess.CompletedProcess[str]:
        """Exit status and output of pytest on the copy; the copied package shadows the installed one."""
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        shared = find_shared()
        if shared is not None:
            environment["SCALEFOLD_SHARED"] = str(shared)
        names = [f"tests/{test}" for test in tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=False, text=True)

    def origin(self) -> Path:
        """Folder from which the tests import the package."""
        command = [sys.executable, "-c", "import scalefold; print(scalefold.__path__[0])"]
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src")}
        output = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=True, text=True)
        return Path(output.stdout.strip())

    def catches(self, mutation: Mutation) -> bool:
        """Plant, test, take out again.

        Raises:
            SystemExit: the text to replace is not there exactly once: the mutation must follow the code.
        """
        file = self.package / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"error: {mutation.file}: '{mutation.old}' occurs {text.count(mutation.old)} times, not once"
            )
        file.write_text(text.replace(mutation.old, mutation.new))
        try:
            return self.run(mutation.test).returncode == TESTS_FAILED
        finally:
            file.write_text(text)


def main() -> int:
    """Check that the tests pass without a defect and fail with each; one summary line; status 1 if one is missed."""
    start, count = time.monotonic(), min(len(MUTATIONS), processors())
    with tempfile.TemporaryDirectory() as folder:
        shops: Queue[Workshop] = Queue()
        for number in range(count):
            shops.put(Workshop(Path(folder) / str(number)))
        first = shops.queue[0]
        if first.origin().resolve() != first.package.resolve():
            raise SystemExit(f"error: tests would import {first.origin()}, not the copy in {first.package}")
        sound = first.run(*sorted({mutation.test for mutation in MUTATIONS}))
        if sound.returncode != 0:
            raise SystemExit(f"{sound.stdout[-3000:]}\nerror: the tests fail without any defect (or are absent)")
        with ThreadPoolExecutor(count) as pool:
            caught = sum(pool.map(lambda mutation: tried(mutation, shops), MUTATIONS))
    print(f"mutations: {caught} of {len(MUTATIONS)} caught in {time.monotonic() - start:.0f} s")
    return 0 if caught == len(MUTATIONS) else 1


def tried(mutation: Mutation, shops: "Queue[Workshop]") -> bool:
    """Whether the mutation is caught in a workshop that is free; says so."""
    shop = shops.get()
    try:
        found = shop.catches(mutation)
    finally:
        shops.put(shop)
    print(f"{'caught' if found else 'MISSED'}  {mutation.title}: {mutation.test}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
