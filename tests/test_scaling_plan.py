"""Plans: every number has a source, nothing is guessed, measured tables come first."""

import csv
from dataclasses import replace

import pytest

from scalefold.config import load_config
from scalefold.errors import ConfigError
from scalefold.mlperf.log.keys import PARAMETERS_COUNT
from scalefold.mlperf.log.published import PUBLISHED_RUNS
from scalefold.report.page import write_report
from scalefold.scaling.convergence import samples_to_converge
from scalefold.scaling.from_config import phases_of, plan_config
from scalefold.scaling.from_scratch import steps_of
from scalefold.scaling.plan import plan, scaling_rows, states_gib, write_scaling_csv
from scalefold.scaling.replay import replay
from scalefold.scaling.step_time import EvalTime, gpu_family, read_eval_times, read_step_times
from scalefold.scaling.study import study
from scalefold.scaling.system import SystemSpec

EOS = SystemSpec(
    "eos_260x8", nodes=260, gpus_per_node=8, gpu="NVIDIA H100 80GB HBM3", dap_size=8, num_eval_ranks=32,
    global_batch_size=256, num_workers=14, cores_per_node=112,
)  # fmt: skip


def write_table(path, rows, head="gpu,precision,dap_size,passes,step_ms,peak_gib"):
    path.write_text("\n".join(["# median of 20 steps", head, *rows]) + "\n")
    return path


def test_a_plan_of_2080_gpus_names_the_source_of_every_number():
    found = plan(EOS)
    assert EOS.dp_size == 256
    assert all(quantity.source for quantity in found.quantities.values())
    assert found.value("step time") == 102.0
    assert "estimated" in found.quantities["step time"].source
    assert found.value("throughput") == pytest.approx(256 / 0.102)
    assert found.value("iterations") == pytest.approx(520.0)
    assert found.value("workers needed") == 12
    starved = plan(replace(EOS, num_workers=2))
    assert any("12 loader workers per replica" in text for text in starved.warnings)
    assert found.fits is True


def test_the_published_step_and_evaluation_times_give_nearly_the_published_minutes():
    found = plan(EOS, kind="published", convergence="published")
    assert found.minutes is not None
    fixed_costs_of_the_published_run = (17.4 - 8 + 13.0 - 8 + 52.1 + 11.3 * 0.8) / 60
    assert found.minutes + fixed_costs_of_the_published_run == pytest.approx(7.51, rel=0.03)


def test_a_measured_step_time_comes_first_and_brings_its_memory(tmp_path):
    rows = [f"H100,bf16,8,{passes},{ms},21.5" for passes, ms in enumerate((70, 80, 90, 120), 1)]
    table = write_table(tmp_path / "step_time.csv", rows)
    found = plan(EOS, step_time_csv=table)
    assert found.value("step time") == pytest.approx(90.0)
    assert found.value("memory per GPU") == 21.5
    assert "step_time.csv" in found.quantities["step time"].source
    assert found.minutes is not None
    assert found.minutes < (plan(EOS).minutes or 0)


def test_rows_of_other_programs_are_not_taken_for_ours(tmp_path):
    rows = ["H100,8,50,reference", "H100,8,100,scalefold"]
    table = write_table(tmp_path / "t.csv", rows, head="gpu,dap_size,step_ms,variant")
    assert [row.step_ms for row in read_step_times(table)] == [100.0]


def test_the_rulers_own_table_is_read_newest_rows_first_and_incomplete_systems_left_out(tmp_path):
    head = "date,device,torch,commit,variant,gpus,dap,precision,passes,median_ms,p10_ms,p90_ms,peak_gib"
    rows = [f"d,NVIDIA H200,t,old,ours,1,1,bf16,{r},{900 + r},1,1,50" for r in (1, 2, 3, 4)]
    rows += [f"d,NVIDIA H200,t,new,ours,1,1,bf16,{r},{100 * r},1,1,{30 + r}" for r in (1, 2, 3, 4)]
    rows += [f"d,NVIDIA H200,t,new,plain,1,1,bf16,{r},5000,1,1,50" for r in (1, 2, 3, 4)]
    rows += ["d,NVIDIA H100 80GB HBM3,t,new,ours_ckpt,1,1,bf16,1,300,1,1,6"]
    (found,) = read_step_times(write_table(tmp_path / "t.csv", rows, head=head))
    assert (found.gpu, found.step_ms, found.peak_gib, found.activation_checkpointing) == ("H200", 250.0, 34.0, False)
    assert "new" in found.source


def test_passes_of_different_measurements_do_not_mix(tmp_path):
    head = "date,device,torch,commit,variant,gpus,dap,precision,passes,median_ms,p10_ms,p90_ms,peak_gib"
    rows = [f"d,NVIDIA H200,t,old,ours,1,1,bf16,{r},{100 * r},1,1,30" for r in (1, 2, 3, 4)]
    rows += ["d,NVIDIA H200,t,new,ours,1,1,bf16,1,1,1,1,30", "d,NVIDIA H200,t,old,ours,4,1,bf16,4,1,1,1,30"]
    (found,) = read_step_times(write_table(tmp_path / "t.csv", rows, head=head))
    assert found.step_ms == 250.0
    assert "at old on 1 GPUs" in found.source


def test_estimates_come_after_measurements_and_before_the_model(tmp_path):
    head = "kind,gpu,dap_size,step_ms"
    table = write_table(tmp_path / "t.csv", ["estimated,H100,8,150", "estimated,H100,4,210"], head=head)
    assert plan(EOS, step_time_csv=table).value("step time") == 150.0
    assert plan(EOS, step_time_csv=table, kind="guarded").value("step time") == 188.0
    table = write_table(tmp_path / "t.csv", ["estimated,H100,8,150", "measured,H100,8,140"], head=head)
    assert plan(EOS, step_time_csv=table).value("step time") == 140.0


def test_an_unknown_kind_of_time_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"t\.csv:3: kind 'guess' must be one of measured, estimated"):
        read_step_times(write_table(tmp_path / "t.csv", ["guess,H100,150"], head="kind,gpu,step_ms"))


def test_training_in_phases_has_hours_from_the_reported_steps_and_no_minutes(repository, tmp_path):
    file = repository / "configs" / "from_scratch_1056_to_2080_h100.yaml"
    table = write_table(tmp_path / "t.csv", ["H100,8,100"], head="gpu,dap_size,step_ms")
    found = plan_config(file, step_time_csv=table)
    assert found.minutes is None
    assert "phases" in found.quantities["time to train"].source
    assert (found.value("batch_128: steps"), found.value("batch_256: steps")) == (5000, 45000)
    cycle_s = 100 * 0.1 + 0.3  # steps of a cycle and the hand-over
    for name, steps in (("fewest", 50_000), ("most", 60_000)):
        assert found.value(f"hours from scratch, {name} steps") == pytest.approx(steps / 100 * cycle_s / 3600)
    assert (found.value("published"), found.value("AlphaFold")) == (10, 168)
    assert "2080 ranks = 256 x DAP-8 + 32" in found.quantities["batch_256: steps"].source


def test_where_training_waits_for_evaluation_its_hours_count_and_each_phase_has_its_batch(repository):
    found = plan_config(repository / "configs" / "from_scratch_8_h100.yaml")
    step_s, evaluation_s = found.value("step time") / 1000, found.value("evaluation")
    expected = 5000 * (step_s + evaluation_s / 100) + 45000 * (2 * step_s + evaluation_s / 100)
    assert found.value("hours from scratch, fewest steps") == pytest.approx(expected / 3600)


def test_a_phase_whose_end_nobody_knows_leaves_the_hours_open(repository, tmp_path):
    base = repository / "configs" / "from_scratch_8_h100.yaml"
    own = tmp_path / "own.yaml"
    own.write_text(
        f"base: {base}\nphases: [{{name: small, global_batch_size: 64, until_lddt_ca: 0.7}}, {{name: rest}}]\n"
    )
    found = plan_config(own)
    assert found.value("hours from scratch") is None
    assert found.quantities["hours from scratch"].source.startswith("phase small: nobody knows its end; set until_step")
    unknown = plan_config(base, ["parallel.gpu=V100"])
    assert unknown.value("hours from scratch, most steps") is None
    assert "nothing known for V100" in unknown.quantities["batch_128: step with evaluation"].source


def test_a_phase_that_ends_at_a_step_ends_there(repository):
    phases = phases_of(load_config(repository / "configs" / "from_scratch_8_h100.yaml").config)
    assert steps_of(phases, 60_000) == [5000, 55_000]
    early = [replace(phases[0], until_step=3000), phases[1]]
    assert steps_of(early, 60_000) == [3000, 57_000]
    assert steps_of([replace(phases[0], until_lddt_ca=0.9), phases[1]], 60_000) == [10_000, 50_000]
    assert steps_of(phases, 4000) == [4000, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["H100,bf16,8,mean,fast,1"], r"t\.csv:3: step_ms 'fast' is not a number"),
        (["H100,bf16,8,mean,-3,1"], r"t\.csv:3: step_ms -3.0 must be positive"),
        (["H100,bf16,8,5,100,1"], r"t\.csv:3: passes '5'"),
        (["H100,bf16,x,1,100,1"], r"t\.csv:3: dap_size 'x'"),
        (["H100,bf16,8,1,100,1", "H100,bf16,8,3,100,1"], r"lacks the rows for passes 2, 4"),
    ],
)
def test_a_wrong_table_is_named_with_file_and_line(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        read_step_times(write_table(tmp_path / "t.csv", rows))


def test_a_missing_table_or_column_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the table"):
        read_step_times(tmp_path / "absent.csv")
    with pytest.raises(ConfigError, match="column step_ms is missing"):
        read_step_times(write_table(tmp_path / "t.csv", ["H100"], head="gpu"))
    with pytest.raises(ConfigError, match="column longest_chain_s is missing"):
        read_eval_times(write_table(tmp_path / "t.csv", ["H100,3"], head="gpu,total_gpu_s"))


def test_what_nobody_knows_is_left_open_with_a_reason():
    found = plan(replace(EOS, gpu="MI300X"))
    assert found.value("step time") is None
    assert "measure it" in found.quantities["step time"].source
    assert found.minutes is None
    assert found.fits is None
    tiny = SystemSpec("tiny", 1, 0, "cpu", global_batch_size=8, precision="fp32", is_benchmark=False)
    assert plan(tiny).minutes is None
    assert "open" in plan(tiny).text()


DGX = SystemSpec("dgx", nodes=1, gpus_per_node=8, gpu="B200-SXM-180GB", num_workers=12)
RACK = replace(DGX, nodes=18, gpus_per_node=4, gpu="NVIDIA GB200", global_batch_size=144, dap_size=4)


@pytest.mark.parametrize(("spec", "gb", "domain"), [(DGX, 180, 8), (RACK, 186, 72)], ids=["DGX B200", "GB200 NVL72"])
def test_a_gpu_that_only_its_vendor_knows_is_planned_by_the_model_and_every_line_says_so(spec, gb, domain):
    found = plan(spec)
    assert found.value("GPU memory") == pytest.approx(gb / 1.073741824)
    assert found.quantities["GPU memory"].source == f"vendor's figure, {gb} GB"
    assert (found.value("NVLink domain"), found.fits) == (domain, True)
    assert "nothing measured" in found.quantities["NVLink domain"].source
    assert found.quantities["step time"].source.startswith("guarded: ")
    assert "no step was measured" in found.quantities["step time"].source
    assert "no evaluation was measured" in found.quantities["evaluation"].source
    assert plan(spec, kind="measured").minutes is None
    assert found.minutes > plan(spec, kind="target").minutes > 0
    (warning,) = found.warnings
    assert warning.startswith(f"no step was ever measured on a {gpu_family(spec.gpu)}")
    assert warning in study(found, runs=1).text()


def test_a_measured_step_ends_the_warning_of_the_vendors_figures(tmp_path):
    found = plan(DGX, step_time_csv=write_table(tmp_path / "t.csv", ["NVIDIA B200,1,200"], head="gpu,dap_size,step_ms"))
    assert (found.value("step time"), found.warnings) == (16 * 200, [])


@pytest.mark.parametrize("change", [{"dap_size": 8}, {"nodes": 9, "gpus_per_node": 8}])
def test_a_rack_joined_by_nvlink_is_still_nodes_of_four_gpus(change):
    (first, *_) = plan(replace(RACK, **change)).warnings
    assert first.startswith("a node of GB200 NVL72 has 4 GPUs, whatever NVLink joins (vendor): gpus_per_node")


@pytest.mark.parametrize("batch", [64, 127, 257, 512])
def test_convergence_is_not_extrapolated_silently(batch):
    with pytest.raises(ConfigError, match="between 128 and 256 only"):
        samples_to_converge(batch)
    guess = samples_to_converge(batch, extrapolate=True)
    assert guess.extrapolated
    assert "EXTRAPOLATED" in guess.source
    spec = SystemSpec("x", 1, 1, "H100", global_batch_size=batch)
    assert plan(spec).minutes is None
    warned = plan(spec, extrapolate=True)
    assert warned.minutes is not None
    assert any("extrapolated" in text for text in warned.warnings)


def test_convergence_meets_the_observed_points_and_interpolates_between():
    assert samples_to_converge(128).mean_samples == 88832
    assert samples_to_converge(256).sd_samples == 13738
    assert samples_to_converge(192).mean_samples == pytest.approx((88832 + 133120) / 2)
    assert not samples_to_converge(192).extrapolated


def test_published_convergence_points_are_the_means_of_the_shipped_logs():
    with PUBLISHED_RUNS.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["submitter"] == "NVIDIA"]
    for batch in (128, 256):
        samples = [int(row["samples_to_converge"]) for row in rows if int(row["global_batch"]) == batch]
        mean = sum(samples) / len(samples)
        sd = (sum((s - mean) ** 2 for s in samples) / (len(samples) - 1)) ** 0.5
        known = samples_to_converge(batch, "published")
        assert known.mean_samples == pytest.approx(mean, abs=1)
        assert known.sd_samples == pytest.approx(sd, abs=1)


def test_accumulation_counts_for_convergence_but_not_for_an_iteration():
    spec = SystemSpec(
        "lonestar6", nodes=32, gpus_per_node=3, gpu="A100-PCIE-40GB", global_batch_size=96,
        gradient_accumulation_steps=2, precision="tf32",
    )  # fmt: skip
    found = plan(spec, kind="published")
    assert found.value("iterations") == pytest.approx(samples_to_converge(192).mean_samples / 96)
    published = [row.published_s / 60 for row in replay().rows if row.submitter == "TACC"]
    assert found.minutes == pytest.approx(sum(published) / len(published), rel=0.10)


def test_several_samples_per_replica_take_that_many_steps():
    spec = SystemSpec("dgx", nodes=1, gpus_per_node=8, gpu="H100", global_batch_size=128)
    assert spec.local_batch_size == 16
    assert plan(spec).value("step time") == pytest.approx(16 * 262)
    assert plan(spec).value("loader demand per node") == pytest.approx(128 / (16 * 0.262))


def test_evaluation_that_is_slower_than_a_cycle_is_warned_of():
    few = plan(replace(EOS, num_eval_ranks=16, nodes=258), kind="guarded")
    assert any("training will wait" in text for text in few.warnings)
    assert not any("training will wait" in text for text in plan(replace(EOS, nodes=264, num_eval_ranks=64)).warnings)


def test_the_longest_chain_bounds_an_evaluation():
    cost = EvalTime("measured", "H100", total_gpu_s=100.0, longest_chain_s=3.0, source="x")
    assert cost.seconds_on(10) == 10.0
    assert cost.seconds_on(1000) == 3.0


def test_memory_grows_without_dap_and_without_a_fit_it_is_said():
    assert states_gib() == pytest.approx(22 * PARAMETERS_COUNT / 1024**3)
    whole, shared = (
        plan(replace(EOS, dap_size=d, global_batch_size=256 * 8 // d)).value("memory per GPU") for d in (1, 8)
    )
    assert whole is not None
    assert shared is not None
    assert whole > shared
    small = plan(SystemSpec("a", 1, 1, "A100-PCIE-40GB", gpu_memory_gib=39.4, global_batch_size=128))
    assert small.fits is False
    assert any("raise dap_size" in text for text in small.warnings)


@pytest.mark.parametrize(
    "change", [{"num_eval_ranks": 31}, {"global_batch_size": 255}, {"num_eval_ranks": 2080}, {"nodes": 0}]
)
def test_impossible_systems_are_refused_by_name(change):
    with pytest.raises(ConfigError, match="eos_260x8"):
        replace(EOS, **change)


@pytest.mark.parametrize(
    ("name", "family"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("A100-SXM4-80GB", "A100"), ("NVIDIA GB200", "GB200"), ("mi300x", "MI300X")],
)
def test_gpu_names_of_drivers_and_submitters_are_understood(name, family):
    assert gpu_family(name) == family


def test_the_scaling_table_is_what_the_report_draws(tmp_path):
    plans = [plan(EOS), plan(SystemSpec("dgx", 1, 8, "H100", global_batch_size=128)), plan(replace(EOS, gpu="MI300X"))]
    rows = scaling_rows(plans)
    assert [row["accelerators"] for row in rows] == ["2080", "8"]
    table = write_scaling_csv(rows, tmp_path / "scaling.csv")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "config": "x"}\n')
    files = write_report(tmp_path, tmp_path / "r.html", scaling_csv=table)
    assert [file.name for file in files.figures] == ["scaling.svg", "scaling.png"]
    with pytest.raises(ConfigError, match="nothing to write"):
        write_scaling_csv([], tmp_path / "x.csv")
