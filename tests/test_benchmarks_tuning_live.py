"""The script of a live tuning run: shares of a step are timed with the choices, without them, and nothing is left."""

import argparse
import contextlib
import csv
import importlib

import pytest

pytest.importorskip("triton")

from scalefold.kernels import tuning


@pytest.fixture
def script(repository, tmp_path, monkeypatch, tables_read_anew):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    tuning_live = importlib.import_module("tuning_live")
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(tuning, "device_kind", lambda: "a_gpu")
    return tuning_live


@pytest.mark.parametrize("present", ["{}", None])
def test_the_table_of_the_device_comes_back_whatever_happens(script, tmp_path, present):
    table, choices = tmp_path / "a_gpu.json", tmp_path / "choices.json"
    choices.write_text('{"layer_norm_forward": {}}')
    if present is not None:
        table.write_text(present)
    with script.choices_in_force(None):
        assert not table.exists()

    def stopped():
        with script.choices_in_force(choices):
            assert table.read_text() == choices.read_text()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (table.read_text() if table.exists() else None) == present


@pytest.mark.parametrize("choices", ["a_gpu.json", "nowhere.json"])
def test_choices_may_be_the_table_itself_and_absent_ones_leave_it_where_it_is(script, tmp_path, choices):
    table = tmp_path / "a_gpu.json"
    table.write_text('{"layer_norm_forward": {}}')
    before = table.read_text()
    with contextlib.suppress(FileNotFoundError), script.choices_in_force(tmp_path / choices):
        assert table.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a_gpu.json"]
    assert table.read_text() == before


def test_choices_that_are_not_there_are_said_before_anything_is_timed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tuning_live.py", "--shares", str(tmp_path / "nowhere.json")])
    with pytest.raises(SystemExit):
        script.main()
    assert "nowhere.json: no such file" in capsys.readouterr().err


def arguments(tmp_path, minutes):
    choices = tmp_path / "choices.json"
    choices.write_text("{}")
    return argparse.Namespace(shares=choices, dap=[4, 8], minutes=minutes, csv=tmp_path / "live.csv", small=False)


def test_shares_are_timed_without_with_and_without_the_choices_again(script, tmp_path, monkeypatch):
    table = tmp_path / "a_gpu.json"
    seen = []
    monkeypatch.setattr(script, "share_rows", lambda *a: seen.append(table.exists()) or [{"dap": "4", "ms": "1.0"}])
    assert script.time_shares(arguments(tmp_path, 5.0))
    assert seen == [False, True, False]
    with (tmp_path / "live.csv").open() as stream:
        assert [row["choices"] for row in csv.DictReader(stream)] == ["before", "after", "before"]


@pytest.fixture
def takes(script, monkeypatch):
    """Turns that take some seconds each; the minutes that every one of them was given."""
    now, given = [0.0], []

    def build(*seconds, rows=lambda turn: [{"dap": "4", "ms": "1.0"}]):
        def share_rows(daps, minutes, extra):
            given.append(minutes)
            now[0] += seconds[len(given) - 1]
            return rows(len(given) - 1)

        monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(script, "share_rows", share_rows)
        return given

    return build


def test_what_the_first_turn_compiled_is_not_held_against_the_others(script, takes, tmp_path):
    given = takes(117.0, 40.0, 30.0)
    assert script.time_shares(arguments(tmp_path, 200.0 / 60))
    assert given == pytest.approx([100 / 60, 83 / 60, 43 / 60]), "the first leaves half, the third takes what is left"


def test_the_third_turn_alone_is_left_out_for_want_of_time_and_said(script, takes, tmp_path, capsys):
    assert len(takes(117.0, 40.0, 0.0)) == 0
    assert script.time_shares(arguments(tmp_path, 190.0 / 60))
    with (tmp_path / "live.csv").open() as stream:
        assert [row["choices"] for row in csv.DictReader(stream)] == ["before", "after"]
    assert "shares before the search: LEFT OUT" in capsys.readouterr().out


def test_choices_that_no_time_is_left_for_are_a_failure(script, takes, tmp_path, capsys):
    takes(301.0)
    assert not script.time_shares(arguments(tmp_path, 5.0))
    assert "shares after the search: LEFT OUT" in capsys.readouterr().out


def test_a_first_turn_that_yields_nothing_is_made_again(script, takes, tmp_path):
    takes(100.0, 100.0, 0.0, rows=lambda turn: [{"dap": "4", "ms": "1.0"}] if turn else [])
    assert script.time_shares(arguments(tmp_path, 201.0 / 60))
