"""Scripts that measure or estimate several GPUs: counted exchanges, breakdown of a step, hand-overs, the page."""

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from processes import run_ranks
from scalefold.config import load_config
from scalefold.report.record import read_metrics
from scalefold.scaling.step_time import read_eval_times, read_step_times
from scalefold.step.parameters import FlatParameters

ONE_BLOCK = [f"model.{stack}.num_blocks=1" for stack in ("template", "extra_msa", "evoformer")]
SHORT = ["data.train_sequence_crop_size=16", "data.max_msa_clusters=12", "data.max_extra_msa=16"]


@pytest.fixture
def script(repository, monkeypatch):
    """Imports a script of ``benchmarks`` by name."""
    for folder in ("measure", "estimate"):
        monkeypatch.syspath_prepend(str(repository / "benchmarks" / folder))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(repository / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def base(repository):
    return load_config(repository / "configs" / "base.yaml", [*ONE_BLOCK, *SHORT]).config


def totals(rows, direction):
    own = [row for row in rows if row["direction"] == direction]
    return sum(row["calls"] for row in own), sum(row["calls"] * row["mib_per_rank"] for row in own)


def test_exchanges_per_block_are_as_documented(script, base):
    counted = {size: script("exchange_counts").count(base, size) for size in (2, 4, 8)}
    blocks = 12 + 12 + 8  # of the Evoformer, the extra MSA, the templates
    for size, rows in counted.items():
        number = blocks - 6 * (size == 2) + 4  # one instead of two exchanges per triangle; ends of stacks
        assert totals(rows, "forward")[0] == number
        assert totals(rows, "backward")[0] == number
        assert {row["exchange"] for row in rows} == {"all_to_all", "all_gather", "reduce_scatter"}
    assert totals(counted[8], "forward")[1] == pytest.approx(totals(counted[4], "forward")[1] / 2, rel=0.01)


def test_counting_leaves_the_collectives_as_they_were(script):
    from scalefold.parallel.dap import collectives
    from scalefold.parallel.dap import points as dap

    before = dict(vars(collectives)), dict(vars(dap))
    with script("exchange_counts").counting(2):
        assert collectives.all_to_all is not before[0]["all_to_all"]
    assert (dict(vars(collectives)), dict(vars(dap))) == before


@pytest.mark.distributed
def test_two_real_ranks_call_what_was_counted(script, repository):
    config = load_config(repository / "configs" / "tiny.yaml", ["parallel.ranks_per_node=2", "parallel.dap_size=2"])
    rows = script("exchange_counts").count(config.config, 2)
    expected = {name: sum(r["calls"] for r in rows if r["exchange"] == name) for name in ("all_to_all", "all_gather")}

    def count(rank):
        import torch.distributed as dist

        calls = {"all_to_all_single": 0, "all_gather_into_tensor": 0}
        for name in calls:
            setattr(dist, name, counted(calls, name, getattr(dist, name)))
        import multi_gpu

        host = multi_gpu.Host(rank, 2, multi_gpu.torch.device("cpu"), None, None)
        step, batch, _ = multi_gpu.build(host, 2, 2, [])
        multi_gpu.first_values(step, batch)
        return calls

    def counted(calls, name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for calls in run_ranks(count, 2):
        assert (calls["all_to_all_single"], calls["all_gather_into_tensor"]) == tuple(expected.values())


def test_layouts_begin_with_one_gpu_and_end_with_data_parallelism(script):
    layouts = script("multi_gpu").layouts
    assert layouts(4, [1, 2, 4]) == [(1, 1), (4, 4), (4, 2), (4, 1)]
    assert layouts(1, [1]) == [(1, 1)]
    assert layouts(6, [4, 2]) == [(1, 1), (6, 2)]


def test_a_breakdown_tells_exchanges_beside_computing_from_exchanges_alone(script):
    module = script("multi_gpu")
    span = module.Span
    spans = [
        span("matmul", 0, 1000),
        span("ncclDevKernel_SendRecv(...)", 1000, 1500),
        span("_forward_kernel", 1600, 2600),
        span("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 2000, 3000),  # 600 of it beside the kernel
    ]
    found = module.breakdown(spans, wall_ms=3.5)
    assert (found["computing_ms"], found["exchange_ms"], found["exchange_alone_ms"]) == (2.0, 1.5, 0.9)
    assert found["gaps_ms"] == pytest.approx(3.5 - 2.9)
    assert (found["all_to_all_ms"], found["all_reduce_ms"], found["other_ms"]) == (0.5, 1.0, 0.0)
    assert (found["kernels"], found["exchanges"]) == (2, 2)


def test_efficiency_is_against_one_gpu(script):
    means = {(1, 1): {1: 100.0, 4: 300.0}, (4, 4): {1: 50.0, 4: 100.0}, (4, 1): {1: 104.0, 4: 304.0}}
    lines = script("multi_gpu").summary(means)
    assert lines[0] == "gpus 1 dap 1: mean over R = 1, 4: 200.0 ms"
    assert "2.67 times faster than on one GPU, efficiency 66.7 %" in lines[1]
    assert "data parallel efficiency 98.0 %" in lines[2]
    del means[1, 1]  # compared with, not timed
    assert script("multi_gpu").summary(means) == [
        "gpus 4 dap 4: mean over R = 1, 4: 75.0 ms",
        "gpus 4 dap 1: mean over R = 1, 4: 204.0 ms",
    ]


def flat_of_a_bf16_and_an_fp32_layer():
    torch.manual_seed(2)
    model = nn.ModuleDict({"heads": nn.Linear(64, 32, bias=False), "trunk_stack": nn.Linear(64, 32, bias=False)})
    dtypes = {"trunk_stack.weight": torch.bfloat16, "heads.weight": torch.float32}
    scales = {"trunk_stack.weight": 0.5, "heads.weight": 1.0}
    return FlatParameters(model, torch.device("cpu"), dtypes.__getitem__, scales.__getitem__)


def test_another_rounding_moves_bf16_weights_by_one_place_at_most(script):
    flat = flat_of_a_bf16_and_an_fp32_layer()
    module, before = script("module_norms"), {name: view.clone() for name, view in flat.named_views(flat.master)}
    weights = module.rounded_otherwise(flat, 1)
    assert all(torch.equal(view, before[name]) for name, view in flat.named_views(flat.master))
    was, now = (
        before["trunk_stack.weight"].bfloat16().view(torch.int16),
        weights["trunk_stack.weight"].view(torch.int16),
    )
    assert set((now - was).abs().unique().tolist()) == {0, 1}
    assert 0.1 < (now != was).float().mean() < 0.6
    assert torch.equal(weights["heads.weight"], before["heads.weight"])
    module.take_weights(flat, weights)
    for name, view in flat.named_views(flat.master):
        assert torch.equal(view, weights[name].float())


def test_norms_are_those_of_mean_gradients_and_are_judged_by_the_noise(script):
    module, flat = script("module_norms"), flat_of_a_bf16_and_an_fp32_layer()
    for gradient in flat.gradients.values():
        gradient.fill_(1.0)
    count = 64 * 32
    assert module.module_norms(flat) == pytest.approx({"heads": count**0.5, "trunk_stack": 0.5 * count**0.5})
    one_gpu = [{"a": 1.0 + seed / 1000, "b": 2.0} for seed in range(2)]
    near = module.norm_rows([{"a": norms["a"] + 0.0015, "b": 2.0} for norms in one_gpu], one_gpu)
    assert [row["noise"] for row in near] == ["9.99e-04", "0.00e+00"]
    assert [(row["norm"], row["one_gpu"], row["roundings"]) for row in near] == [("1.002", "1.0005", 2), ("2", "2", 2)]
    assert module.beyond(near) == []
    assert {(row["error"], row["one_gpu_error"]) for row in near} == {("", "")}
    exact = module.norm_rows([{"a": 1.1}] * 2, [{"a": 1.0}] * 2, [{"a": 2.0}, {"a": 1.0}])
    assert [(row["error"], row["one_gpu_error"]) for row in exact] == [("3.26e-01", "3.54e-01")]
    assert module.beyond(module.norm_rows([{"a": 1.0025, "b": 2.1}, {"a": 1.0035, "b": 2.0}], one_gpu)) == ["a", "b"]
    once = module.norm_rows([{"a": 1.0025, "b": 2.0}, one_gpu[1]], one_gpu)
    assert module.beyond(once) == [], "one draw of several lies further away than it may on the average"


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("untimed", [[], ["--untimed-one"]], ids=["all", "one untimed"])
def test_the_multi_gpu_script_runs_on_the_cpu(repository, tmp_path, untimed):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--small", "--repeats", "1", "--passes", "1", "--out", str(tmp_path), *untimed]
    done = subprocess.run(
        [*torchrun, "benchmarks/measure/multi_gpu.py", *options],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "step_time.csv").open()))
    timed = [(row["gpus"], row["dap"], row["passes"]) for row in rows]
    assert timed == [("1", "1", "1"), ("2", "2", "1"), ("2", "1", "1")][len(untimed) :]
    assert done.stdout.count("  ok\n") == 3
    assert ("data parallel efficiency" in done.stdout) is not bool(untimed)


def metrics_of_two_cycles(folder):
    """Steps of 100 ms; a stall of 20 ms after step 4 beside 300 ms of waiting; results 250 ms after their cycle."""
    lines = [{"kind": "run", "config": "x"}]
    for step in range(1, 9):
        time_s = 0.1 * step + (0.32 if step > 4 else 0.0)
        row = {"step": step, "loss": 1.0, "step_ms": 100.0, "data_ms": 1.0, "passes": 1, "time_s": time_s}
        lines.append({"kind": "step", **row})
    for step, time_s in ((4, 0.97), (8, 1.37)):
        row = {"step": step, "samples": step, "lddt_ca": 0.5, "seconds": 0.2, "time_s": time_s, "chains": {"a": 0.5}}
        lines.append({"kind": "eval", **row})
    lines.append({"kind": "event", "name": "training_waited_for_evaluation", "step": 4, "seconds": 0.3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_metrics(folder)


def test_a_hand_over_is_told_from_waiting_for_the_evaluators(script, tmp_path):
    module, metrics = script("async_evaluation"), metrics_of_two_cycles(tmp_path)
    np.testing.assert_allclose(module.between_cycles_s(metrics, 4), [0.02])
    np.testing.assert_allclose(module.result_s(metrics), [0.57, 0.25])
    assert metrics.step[module.beside_evaluation(metrics)].tolist() == [6]
    case = module.Case("beside", 1, 1, 1, cycles=2, cycle_steps=4, small=True)
    row = module.row(case, metrics, module.Ended([4, 0], metrics.path.stat().st_mtime + 1.5))
    assert (row["step_ms"], row["beside_ms"], row["apart_ms"]) == (100.0, 100.0, 100.0)
    assert (row["stall_ms"], row["waited_s"]) == (20.0, 0.3)
    assert (row["evaluations"], row["eval_s"], row["end_s"], row["statuses"]) == (2, 0.2, 1.5, "4 0")
    assert module.complaints(case, metrics, module.Ended([4, 0], 0.0)) == []


def test_bad_ends_and_missing_evaluations_are_named(script, tmp_path):
    module, metrics = script("async_evaluation"), metrics_of_two_cycles(tmp_path)
    case = module.Case("beside", 1, 1, 1, cycles=3, cycle_steps=4, small=True)
    found = module.complaints(case, metrics, module.Ended([4, 4], 0.0))
    assert found == ["rank 1 ended with 4", "1 of 3 evaluations are missing, the first after step 12"]
    assert module.complaints(case, None, module.Ended([2, None], 0.0))[-1] == "no metrics were written"


@pytest.mark.long
@pytest.mark.distributed
def test_training_beside_evaluation_is_measured_on_the_cpu(repository, tiny_store, tmp_path):
    command = [sys.executable, "benchmarks/measure/async_evaluation.py", str(tiny_store), "--small", "--cycles", "2"]
    options = ["--cycle-steps", "4", "--csv", str(tmp_path / "t.csv"), "--workers", "1"]
    done = subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    beside, alone = csv.DictReader((tmp_path / "t.csv").open())
    assert (beside["evaluations"], beside["statuses"], alone["statuses"]) == ("2", "4 0", "4")
    assert float(beside["step_ms"]) > 0


def test_estimates_are_ordered_and_readable_by_plans(script, repository):
    module = script("dap_estimate")
    for gpu in module.GPUS:
        for size in module.DAP_SIZES:
            low, high = (module.parts(gpu, size, scenario).total for scenario in (module.LOW, module.HIGH))
            assert low <= high * 1.000001
        assert module.parts(gpu, 1, module.HIGH).total == pytest.approx(module.measured(gpu).mean_ms)
    for scenario in ("low", "high"):
        steps = read_step_times(repository / "benchmarks" / "results" / f"step_estimate_{scenario}.csv")
        assert {(row.gpu, row.dap_size) for row in steps} == {(g, s) for g in module.GPUS for s in module.DAP_SIZES}
        assert len(read_eval_times(repository / "benchmarks" / "results" / f"eval_estimate_{scenario}.csv")) == 1


def test_an_exchange_costs_what_was_measured_at_its_size(script, monkeypatch):
    module = script("dap_estimate")
    table = [{"gpus": "4", "mib_per_rank": f"{mib}", "all_to_all_us": f"{us}"} for mib, us in ((0.25, 9), (4.0, 28))]
    table.append({"gpus": "4", "mib_per_rank": "4.0", "all_to_all_us": "27"})  # measured again
    monkeypatch.setattr(module, "read", lambda name: table)
    row = table[-1]
    assert module.exchange_us("all_to_all", 4.0, 4, module.HIGH) == float(row["all_to_all_us"])
    assert module.exchange_us("all_to_all", 4.0, 8, module.HIGH) == 2 * float(row["all_to_all_us"])
    assert module.exchange_us("all_to_all", 0.01, 4, module.HIGH) == 9.0
    table += [{"gpus": "2", "mib_per_rank": f"{mib}", "all_to_all_us": f"{us}"} for mib, us in ((0.0, 5), (8.0, 25))]
    assert module.exchange_us("all_to_all", 4.0, 2, module.LOW) == 15.0
    assert (
        module.exchange_us("all_to_all", 4.0, 8, module.LOW) == 5 + 20 * (4.0 * 7 / 4) / 8
    )  # 7 of 8 parts, not 1 of 2


def share_rows(dap, wall):
    """A measured share: 3/4 of the step shared, 1/8 repeated, 1/16 exchanges, 1/16 gaps."""
    times = {"median_ms": wall, "computing_ms": wall * 7 / 8, "repeated_ms": wall / 8, "gaps_ms": wall / 16}
    times["exchange_alone_ms"] = wall / 16
    known = {"date": "d", "commit": "c", "device": "NVIDIA H100 80GB HBM3", "dap": str(dap)}
    return [known | {"passes": str(r)} | {name: str(ms * r) for name, ms in times.items()} for r in (1, 2, 3, 4)]


def test_with_a_measured_share_only_the_wire_is_estimated(script, monkeypatch):
    module = script("dap_estimate")
    before, original = module.parts("H100", 4, module.LOW), module.read
    exchanges = [{"mib_per_rank": f"{mib}", "all_to_all_us": f"{us}"} for mib, us in ((0.0, 4), (8.0, 12))]
    tables = {
        "dap_share.csv": [*share_rows(8, 999.0), *share_rows(8, 64.0)[:1], *share_rows(8, 32.0)],
        "exchange_alone.csv": [row | {"dap": "8"} for row in exchanges],
        "exchange_symmetric.csv": [row | {"gpus": "2"} for row in exchanges[:1]]
        + [{"gpus": "2", "mib_per_rank": "14.0", "all_to_all_us": "34"}],
        "exchange_counts.csv": [
            {"dap": "8", "direction": way, "exchange": "all_to_all", "mib_per_rank": "4.0", "calls": "100"}
            for way in ("forward", "backward")
        ],
    }
    monkeypatch.setattr(module, "read", lambda name: tables.get(name) or original(name))
    between_us, inside_us = 4 + 30 * (4.0 * 7 / 4) / 14, 8.0
    wire_ms = (2.5 + 1) * 100 * (between_us - inside_us) / 1e3
    for scenario, factor in ((module.LOW, 1), (module.HIGH, 2)):
        found = module.parts("H100", 8, scenario)
        assert found.total == pytest.approx(80.0 + factor * wire_ms)
        assert (found.shared, found.repeated, found.copies) == pytest.approx((60.0, 15.0, 0.0))
        assert found.exchanges == pytest.approx(5.0 + factor * wire_ms)
    tables["exchange_symmetric.csv"] += [row | {"gpus": "8"} for row in exchanges]
    assert module.parts("H100", 8, module.LOW).total == pytest.approx(80.0), "measured among eight: no wire beyond it"
    monkeypatch.setattr(module, "read", original)
    assert module.parts("H100", 4, module.LOW) == before


def test_a_share_without_all_passes_is_not_taken(script, monkeypatch):
    module = script("dap_estimate")
    rows = share_rows(8, 32.0)
    monkeypatch.setattr(module, "read", lambda name: rows[:3])
    assert module.share_alone("H100", 8) is None
    monkeypatch.setattr(module, "read", lambda name: [rows[0], rows[3]])
    assert module.share_alone("H100", 8).wall == pytest.approx(80.0)
    assert module.share_alone("H200", 8) is None


def test_a_share_with_one_pass_grows_as_another_commits_did(script, monkeypatch):
    module = script("dap_estimate")
    before, newest = share_rows(8, 32.0), share_rows(8, 16.0)[0]
    newer = newest | {"commit": "newer", "device": "NVIDIA H100 of another kind"}
    monkeypatch.setattr(module, "read", lambda name: [*before, newer])
    growth = 80.0 / float(before[0]["median_ms"])
    found = module.share_alone("H100", 8)
    assert found.wall == pytest.approx(growth * float(newer["median_ms"]))
    assert found.computing == pytest.approx(growth * float(newer["computing_ms"]))
    assert found.commit.startswith("newer, R = 1")
    monkeypatch.setattr(module, "read", lambda name: [*before, newer | {"commit": before[0]["commit"]}])
    assert module.share_alone("H100", 8).wall == pytest.approx(found.wall), "one commit on two cards"
    monkeypatch.setattr(module, "read", lambda name: [newer])
    assert module.share_alone("H100", 8) is None


def test_tables_of_shares_say_so_where_nothing_is_measured(script, monkeypatch):
    module = script("share_tables")
    monkeypatch.setattr(module, "read", lambda name: [])
    assert module.share_table() == module.agreement_table() == module.NONE
    row = {"exchange_alone_ms": "2", "kernels": "10624"}
    share = [r | row for r in share_rows(2, 32.0)]
    real = {
        "device": "NVIDIA H100 80GB HBM3",
        "gpus": "2",
        "dap": "2",
        "passes": "1",
        "commit": "b",
        "kernels": "10624",
    }
    tables = {"dap_share.csv": share, "step_breakdown.csv": [real | {"computing_ms": "28", "gaps_ms": "1"}]}
    monkeypatch.setattr(module, "read", lambda name: tables[name])
    assert "| 2 | 4 | 128.0 |" in module.share_table()
    assert "| 1 | 30.0 | 29.0 | 3.4 | yes | 10624 / 10624 | c / b |" in module.agreement_table()


def test_hours_from_scratch_are_tabulated_for_every_such_system(script, repository):
    table = script("share_tables").scratch_table()
    for file in (repository / "configs").glob("from_scratch_*.yaml"):
        assert f"`{file.stem}`" in table
    assert table.count("| 10 | 168 |") == 2


def test_tables_of_the_page_are_replaced_and_nothing_else(script):
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    filled = script("plot_scaling").fill(page, {"x": lambda: "new", "y": lambda: "other"})
    assert filled == "a\n<!-- table: x -->\nnew\n<!-- end -->\nb\n<!-- table: y -->\nother\n<!-- end -->\n"
    with pytest.raises(KeyError):
        script("plot_scaling").fill(page, {})


def test_figures_of_the_page_exist_and_are_drawings(repository):
    page = (repository / "docs" / "scaling.md").read_text()
    names = re.findall(r'src(?:set)?="figures/([^"]+)"', page)
    assert len(names) == 8
    assert [name.removesuffix("_dark.svg") + ".svg" for name in names[::2]] == names[1::2], "dark first, then light"
    for name in names:
        root = xml.etree.ElementTree.parse(repository / "docs" / "figures" / name).getroot()
        assert root.tag.endswith("svg")
        assert SimpleNamespace(**root.attrib).viewBox


def test_a_dark_figure_is_the_light_one_in_other_colours(script, repository):
    module = script("drawings")
    light_of = {dark: module.PALETTE[name] for name, dark in module.DARK.items()} | {module.DARK_GROUND: "white"}
    figures = repository / "docs" / "figures"
    names = ("exchange_costs", "minutes_by_gpus", "step_by_dap", "step_history", "step_parts")
    for light in (figures / f"{name}.svg" for name in names):
        text = light.with_name(f"{light.stem}_dark.svg").read_text()
        assert not [colour for colour in (*module.PALETTE.values(), "white", "black", "#000") if colour in text]
        text = re.sub("|".join(light_of), lambda found: light_of[found[0]], text)
        assert text == light.read_text(), "draw the figures again"
