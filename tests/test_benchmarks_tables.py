"""Tables of README.md and docs/performance.md: up to date, and made of the newest rows of each card."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

PAGES = ("README.md", "docs/performance.md")
COLUMNS = "date,device,torch,commit,variant,gpus,dap,precision,passes,median_ms,p10_ms,p90_ms,peak_gib"


@pytest.fixture
def tables(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "estimate"))
    return __import__("tables")


def fill(text: str, own: Mapping[str, Callable[[], str]]) -> str:
    return __import__("pages").fill(text, own)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_its_csv_files_say(tables: ModuleType, repository: Path, page: str) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    assert "<!-- table: headline -->" in text
    remedy = f"run python benchmarks/estimate/tables.py --write {' '.join(PAGES)}"
    assert fill(text, tables.TABLES) == text, remedy


def test_the_page_on_tuning_is_what_its_csv_files_say(tables: ModuleType, repository: Path) -> None:
    own = __import__("tuning_tables")
    text = (repository / "docs" / "tuning.md").read_text(encoding="utf-8")
    assert "<!-- table: spills -->" in text
    assert fill(text, own.TABLES) == text, "run python benchmarks/estimate/tuning_tables.py --write docs/tuning.md"


def steps(*rows: tuple[str, str, str, float]) -> str:
    """A table of steps: device, commit, passes, ms."""
    lines = [f"2026-01-01,{d},t,{c},ours,1,1,bf16,{r},{ms},1,1,{ms / 10}" for d, c, r, ms in rows]
    return "\n".join([COLUMNS, *lines]) + "\n"


def test_a_new_row_of_one_card_changes_that_card_alone(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [("NVIDIA H200", "aaa", str(r), 100.0 * r) for r in (1, 2, 3, 4)]
    other = [("NVIDIA H100 80GB HBM3", "aaa", str(r), 200.0 * r) for r in (1, 2, 3, 4)]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "step_time.csv").write_text(steps(*old, *other, *((d, "bbb", r, ms / 2) for d, _, r, ms in old)))
    lines = tables.step_table().splitlines()[2:]
    assert lines[0].startswith("| H200 | ours | bbb | 50 | 100 | 150 | 200 | **125.0** |")
    assert lines[1].startswith("| H100 | ours | aaa | 200 | 400 | 600 | 800 | **500.0** |")


@pytest.mark.parametrize(("commit", "bits"), [("aaa", "yes"), ("bbb", "–")])
def test_equal_losses_are_those_of_two_starts_of_one_commit(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str, bits: str
) -> None:
    """A start whose second one found no time does not show the second one of an earlier commit."""
    columns = "commit,layout,exit_status,stop_to_exit_s,start_to_first_step_s,checkpoint_stall_ms"
    starts = [("aaa", "dap2", ""), ("aaa", "dap2 again", "yes"), (commit, "dap2", "")]
    lines = [f"{own},{layout},4 4,8.0,0.3,21.0,0.1,{equal},0" for own, layout, equal in starts]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "gpu_runs.csv").write_text(
        "\n".join([f"{columns},step_over_ruler_percent,losses_equal,left_behind", *lines])
    )
    assert tables.run_table().splitlines()[2].endswith(f"| {bits} | 0 | {commit} |")


def test_no_mean_mixes_the_passes_of_two_commits(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [("NVIDIA H200", "aaa", str(r), 100.0 * r) for r in (1, 2, 3, 4)]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "step_time.csv").write_text(steps(*old, ("NVIDIA H200", "bbb", "1", 50.0)))
    assert "| aaa | 100 | 200 | 300 | 400 | **250.0** |" in tables.step_table()
    (tmp_path / "step_time.csv").write_text(steps(("NVIDIA H200", "bbb", "1", 50.0)))
    assert "| bbb | 50 | – | – | – | **–** |" in tables.step_table()


def test_gpus_of_a_sample_are_set_against_one_of_the_same_commit_and_passes(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("aaa", 1, 1, 1, 100), ("aaa", 2, 2, 1, 50), ("bbb", 1, 1, 1, 90), ("bbb", 1, 1, 2, 120)]
    rows += [
        ("bbb", 2, 2, 1, 60),
        ("bbb", 2, 1, 1, 95),
        ("ccc", 1, 1, 1, 10),
        ("aaa", 4, 4, 1, 40),
        ("ddd", 2, 2, 1, 1),
    ]
    lines = [f"NVIDIA H200,{commit},{gpus},{dap},{r},{ms}" for commit, gpus, dap, r, ms in rows]
    (tmp_path / "step_breakdown.csv").write_text("\n".join(["device,commit,gpus,dap,passes,wall_ms", *lines]) + "\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    two, four = tables.shared_rows("NVIDIA H200")
    assert two[1:] == ["1.50 times as fast as one's", "H200", "bbb"]
    assert four == [
        "step of 4 GPUs that share a sample (DAP 4), mean over 1 passes",
        "2.50 times as fast as one's",
        "H200",
        "aaa",
    ]


def test_the_figures_of_others_have_a_source(repository: Path, tables: ModuleType) -> None:
    peers = tables.read("peer_figures")
    assert all(row["source"] and row["card"] and float(row["value"]) > 0 for row in peers)
    known = {row["value"] for row in peers}
    for page in PAGES:
        text = (repository / page).read_text(encoding="utf-8")
        assert set(re.findall(r"\b(\d{3,4}) ms(?: \||;)", text)) <= known


def test_every_rival_has_its_column_and_the_fastest_is_set_against_ours(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "date,device,torch,commit,operation,shape,variant,forward_us,backward_us,max_rel_error"
    triangle = "triangle_multiplication,1x256x256x128_outgoing"
    timed = [("bbb", "ours", 80, 320), ("bbb", "fast_trimul", 200, 1800), ("aaa", "compiled", 100, 500)]
    timed += [("bbb", "cuequivariance", 90, 270)]
    lines = [f"2026-01-01,NVIDIA H100,t,{commit},{triangle},{name},{f},{b},0.01" for commit, name, f, b in timed]
    alone = "2026-01-01,NVIDIA H100,t,bbb,transition,1x256x256x128by4,ours,50,200,0.01"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "kernels.csv").write_text("\n".join([head, *lines, alone]) + "\n")
    head, _, first, second = tables.operation_table().splitlines()
    assert head.split(" | ")[1:] == [
        "ours", "compiled", "cuEquivariance", "fast-trimul", "plain", "fastest other / ours", "commit |"
    ]  # fmt: skip
    assert first.endswith("| 80 / 320 | *100 / 500* | 90 / 270 | 200 / 1800 |  | 0.90 | bbb |")
    assert second.endswith("| 50 / 200 |  |  |  |  | – | bbb |")


def test_a_curve_is_shown_beside_what_rounding_alone_does_and_not_before_it_is_measured(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.curve_table() == ""
    head = "date,device,commit,variant,trained,term,steps,first,last,plain_last,difference,band,at_step,"
    lines = [
        f"2026-01-01,NVIDIA H100,bbb,{variant},{trained},{term},500,3,1,1,{difference},5e-2,77,-1.04e-1,1.1e-2,{same}"
        for trained, variant, difference, same in (
            (0, "ours_rounded", "8e-2", "no"), (9, "ours", "9e-2", "no"), (9, "rounded", "6e-2", "no"),
            (9, "ours", "4e-2", "yes"),
        )
        for term in (*tables.TERMS, "non_finite_terms")
    ]  # fmt: skip
    (tmp_path / "training_curve.csv").write_text("\n".join([head + "mean_difference,standard_error,same", *lines]))
    shown = tables.curve_table().splitlines()
    assert [line.split(" | ")[0] for line in shown[2:]] == [f"| {name}" for name in tables.TERMS.values()]
    ours, rounded = "0.040 of 0.050 | 77 | -10.4 ± 1.1 %", "**0.060 of 0.050** | 77 | -10.4 ± 1.1 %"
    assert shown[2] == f"| loss | {ours} | {rounded} |"
