"""The way to today's step: its picture, and floor, budget and measured time of sub-layers, from their CSV files."""

import re
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from scalefold.tune.operation_cases import training_cases

N, SEQUENCES, EXTRA, TEMPLATES = 256, 128, 1024, 4
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
NOT_IN_A_BLOCK = {"layer_norm", "structure_iterations", "invariant_point_attention", "point_errors"}
WHOLE = {"triangle_project 1x256x256x128", "triangle_output 1x256x256x128"}  # timed as triangle_multiplication
WHOLE |= {f"triangle_product 1x128x256x256_{direction}" for direction in ("outgoing", "incoming")}


@pytest.fixture
def folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "estimate"))
    return repository / "benchmarks" / "results"


@pytest.fixture
def tables(folder: Path) -> ModuleType:
    return __import__("tables")


@pytest.fixture
def layers(folder: Path) -> ModuleType:
    return __import__("sub_layers")


@pytest.fixture
def history(folder: Path) -> ModuleType:
    return __import__("plot_history")


@pytest.fixture
def elsewhere(tables: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the result files, which tables and figures read."""
    for file in folder.glob("*.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def append(file: Path, *lines: str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def steps(device: str, commit: str, ms: float) -> list[str]:
    return [f"2030-01-01,{device},t,{commit},ours,1,1,bf16,{passes},{ms},1,1,1" for passes in (1, 2, 3, 4)]


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_shows_every_step_of_the_csv_files_and_what_came_with_it(
    repository: Path, history: ModuleType
) -> None:
    drawn = xml.etree.ElementTree.parse(repository / "docs" / "figures" / "step_history.svg").getroot()
    words = {"".join(node.itertext()).strip() for node in drawn.iter() if node.tag.endswith("text")}
    for name, rows in history.sections():
        assert {f"{name}:", *(row.words() for row in rows)} <= words, "run python benchmarks/estimate/plot_history.py"
        assert {f"{row.what}, {row.commit}" if row.commit else row.what for row in rows} <= words
        assert not [row.commit for row in rows if row.what == history.UNNAMED], "name them in step_causes.csv"


def test_each_card_falls_from_its_own_first_figure(history: ModuleType, tables: ModuleType) -> None:
    found = dict(history.sections())
    assert list(found) == ["H200", "H100"]
    for rows in found.values():
        assert rows[0].before is None
        assert [row.before for row in rows[1:]] == [row.after for row in rows[:-1]]
    assert found["H200"][0].after == 914.0
    last = {device: list(tables.step_history(device).values())[-1] for device in (H100, H200)}
    assert [f"{found[name][-1].after:.1f}" for name in ("H100", "H200")] == [last[H100], last[H200]]


def test_a_commit_that_nobody_named_is_drawn_without_a_cause(elsewhere: Path, history: ModuleType) -> None:
    append(elsewhere / "step_time.csv", *steps(H100, "fff0000", 250.0))
    rows = history.falls(H100)
    assert (rows[-1].what, rows[-1].after) == (history.UNNAMED, 250.0)
    assert "not named yet, fff0000" in history.step_history_plot().svg


def test_a_card_without_a_gate_has_its_rows_and_leaves_the_others_alone(
    elsewhere: Path, history: ModuleType, tables: ModuleType
) -> None:
    before = tables.sub_layer_table(), tables.goal_table()
    append(elsewhere / "step_time.csv", *steps("NVIDIA B200", "fff0000", 123.4))
    append(elsewhere / "kernels.csv", "2030-01-01,NVIDIA B200,t,fff0000,transition,1x256x256x128by4,ours,1,1,0")
    assert dict(history.sections())["B200"][0].after == 123.4
    assert "B200:" in history.step_history_plot().svg
    assert (tables.sub_layer_table(), tables.goal_table()) == before


def test_the_page_shows_picture_and_goals(repository: Path, elsewhere: Path, tables: ModuleType) -> None:
    page = (repository / "docs" / "performance.md").read_text(encoding="utf-8")
    names = re.findall(r'src(?:set)?="figures/([^"]+)"', page)
    assert names == ["step_history_dark.svg", "step_history.svg"], "dark first, then light"
    append(elsewhere / "step_time.csv", *steps(H200, "fff0000", 180.0))
    assert "| H200 | 180.0 | 240 (-25 %) | 190 (-5 %) | fff0000 |" in tables.goal_table()


# --- sub-layers -------------------------------------------------------------------------------------------------------


def attention(rows: int, length: int, width: int, heads: int, pair: int, own: bool = False) -> list[list[float]]:
    """Operations, bytes and lane operations, forward and backward; ``pair``: what the bias is projected from."""
    x, scores = rows * length * width, rows * heads * length**2
    projected, bias = x, heads * length**2 if pair else 0  # heads times channels is the width everywhere
    read = 0 if own else pair
    forward = [10 * x * width + 4 * scores * width // heads + 2 * pair * heads, 2 * (2 * x + read + 2 * bias)]
    backward = [20 * x * width + 10 * scores * width // heads + 6 * pair * heads]
    backward.append(2 * (3 * x + 10 * projected + 2 * read + 4 * bias))
    return [[*forward, 14 * scores], [*backward, 18 * scores]]


def transition(rows: int, width: int, factor: int) -> list[list[float]]:
    x, weight = rows * width, 2 * rows * width**2 * factor
    return [[2 * weight, 4 * x, 0], [4 * weight, 2 * (3 * x + 2 * factor * x), 0]]


def outer_product(sequences: int, width: int, stored: bool) -> list[list[float]]:
    m, z, product = sequences * N * width, N * N * 128, N * N * 32 * 32
    projected, outer, linear = 2 * m * 64, 2 * product * sequences, 2 * product * 128
    backward = 2 * projected + (2 if stored else 3) * outer + 2 * linear
    kept = 2 * product if stored else 0
    return [[projected + outer + linear, 2 * (m + 2 * z), 0], [backward, 2 * (2 * m + z + kept), 0]]


def triangle(batch: int, width: int) -> list[list[float]]:
    z, product = batch * N * N * width, 2 * batch * N**3 * width
    projected, output = 8 * z * width, 4 * z * width
    return [[projected + product + output, 14 * z, 0], [3 * projected + 2 * product + 3 * output, 26 * z, 0]]


PAIR = N * N * 128
WORK = {
    "MSA row attention": attention(SEQUENCES, N, 256, 8, PAIR),
    "MSA column attention": attention(N, SEQUENCES, 256, 8, 0),
    "MSA transition": transition(SEQUENCES * N, 256, 4),
    "outer product mean": outer_product(SEQUENCES, 256, stored=False),
    "triangle multiplication, outgoing": triangle(1, 128),
    "triangle multiplication, incoming": triangle(1, 128),
    "triangle attention, starting node": attention(N, N, 128, 4, PAIR, own=True),
    "triangle attention, ending node": attention(N, N, 128, 4, PAIR, own=True),
    "pair transition": transition(N * N, 128, 4),
    "extra MSA row attention": attention(EXTRA, N, 64, 8, PAIR),
    "extra MSA transition": transition(EXTRA * N, 64, 4),
    "extra MSA outer product mean": outer_product(EXTRA, 64, stored=True),
    "template triangle attention": attention(TEMPLATES * N, N, 64, 4, TEMPLATES * N * N * 64, own=True),
    "template triangle multiplication": triangle(TEMPLATES, 64),
    "template pair transition": transition(TEMPLATES * N * N, 64, 2),
}


def test_operations_and_bytes_of_sub_layers_follow_from_their_shapes(tables: ModuleType) -> None:
    rows = tables.read("sub_layers")
    for name, work in WORK.items():
        own = [[float(row[key]) * 1e9 for key in ("gflop", "gb", "glanes")] for row in rows if row["sub_layer"] == name]
        for counted, expected in zip(own, work, strict=True):
            assert counted == pytest.approx(expected, rel=1e-3, abs=5e5), name


def test_a_floor_is_the_longest_of_operations_bytes_and_lanes(layers: ModuleType) -> None:
    card = {"bf16_tflops": "500", "tb_per_second": "4", "lane_tops": "20"}
    work = {"gflop": "50", "gb": "0.2", "glanes": "1"}
    assert layers.floor_us(work, card) == pytest.approx(100.0)
    assert layers.floor_us(work | {"gb": "1"}, card) == pytest.approx(250.0)
    assert layers.floor_us(work | {"glanes": "10"}, card) == pytest.approx(500.0)


def test_every_operation_of_a_block_belongs_to_sub_layers_that_call_it_as_often_as_a_step_does(
    tables: ModuleType, layers: ModuleType
) -> None:
    calls: Counter[str] = Counter()
    number = {row["sub_layer"]: int(row["calls"]) for row in tables.read("sub_layers")}
    for name in layers.OPERATIONS:
        calls.update(dict.fromkeys(layers.measured_names(name), number[name]))
    cases = {case.name: case.calls for case in training_cases(1) if case.operation not in NOT_IN_A_BLOCK}
    assert {name: calls.pop(name) for name in cases if name not in WHOLE} == {
        name: count for name, count in cases.items() if name not in WHOLE
    }
    whole = [f"triangle_multiplication 1x256x256x128_{direction}" for direction in ("outgoing", "incoming")]
    assert calls == dict.fromkeys(whole, 52) | {"triangle_product 4x64x256x256": 4}  # the last is no case


def test_the_table_of_sub_layers_names_what_has_no_measurement_and_takes_no_other_cards(
    elsewhere: Path, tables: ModuleType
) -> None:
    row = f"2030-01-01,{H200},t,fff0000,transition,1x256x256x128by4,ours,40.0,160.0,1e-3"
    for name in ("kernels.csv", "small_kernels.csv", "dap_share.csv"):  # of this card nothing else was measured
        header, *known = (elsewhere / name).read_text().splitlines(keepends=True)
        (elsewhere / name).write_text(header + "".join(line for line in known if H200 not in line))
    append(elsewhere / "kernels.csv", row)
    append(elsewhere / "step_time.csv", *steps(H200, "fff0000", 180.0))
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.sub_layer_table().splitlines()}
    assert "sub-layer on H200" in lines
    assert lines["pair transition"].endswith("| 22 / 43 | 45 / 125 | 40 / 160 | 3.4 / 8.9 / 10.4 | fff0000 |")
    assert "| not measured | " in lines["MSA row attention"]
    assert lines["**sum**"].endswith("/ 10.4** |  |")
    assert lines["the step itself"].endswith("| 180.0 | fff0000 |")
    append(elsewhere / "kernels.csv", row.replace(H200, H100).replace("40.0,160.0", "50.0,50.0"))
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.sub_layer_table().splitlines()}
    assert "| 50 / 50 | 4.0 / 10.2 / 5.2 | fff0000 |" in lines["pair transition"]
    assert "`triangle_product 4x64x256x256` not measured" in lines["template triangle multiplication"]
