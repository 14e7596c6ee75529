"""Progress: the step line's form, what is left out, and how often lines appear."""

import io

import pytest

from scalefold.report.console import Progress, format_duration, step_line
from scalefold.report.record import EvalRow, StepRow

FULL = StepRow(
    step=840,
    loss=1.8731,
    terms={"fape": 0.4119, "chi": 0.3},
    step_ms=412.2,
    data_ms=3.1,
    peak_gib=71.42,
    phases_ms={"fwd": 148.0, "bwd": 171.4, "comm": 61.0, "opt": 9.0},
)
EVAL = EvalRow(step=800, samples=204800, lddt_ca=0.7808, seconds=25.4)


def test_a_full_step_line_has_the_documented_form():
    assert step_line(FULL, EVAL, 0.8, 192.0) == (
        "step  840  loss 1.873  fape 0.412  lddt 0.781@800→0.800  "
        "412 ms (data 3 fwd 148 bwd 171 comm 61 opt 9)  71.4 GiB  eta 3m12s"
    )


def test_unknown_parts_are_left_out():
    assert step_line(StepRow(step=1, loss=9.5)) == "step    1  loss 9.500"
    assert step_line(StepRow(step=1, loss=9.5, step_ms=80.0)) == "step    1  loss 9.500  80 ms"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3s"), (59.6, "1m00s"), (192, "3m12s"), (7380, "2h03m"), (200000, "2d07h"), (-5, "0s")],
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text


def test_plain_lines_are_rate_limited_but_evaluations_and_the_last_step_always_appear():
    stream = io.StringIO()
    with Progress(target=0.8, expected_steps=100, stream=stream, min_interval_s=1000.0) as progress:
        for step in range(1, 51):
            progress.step(StepRow(step=step, loss=1.0, step_ms=1000.0))
        progress.evaluation(EvalRow(step=40, samples=5120, lddt_ca=0.81, seconds=2.0))
        progress.step(StepRow(step=51, loss=1.0, step_ms=1000.0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step    1  loss 1.000  1000 ms  eta 1m39s"
    assert lines[1] == "step   50  loss 1.000  1000 ms  eta 50s"  # held back until something is shown behind it
    assert lines[2] == "eval step 40  samples 5120  lddt 0.810@40→0.800  2.0 s  target reached"
    assert lines[3] == "step   51  loss 1.000  lddt 0.810@40→0.800  1000 ms  eta 49s"
    assert len(lines) == 4


def test_without_a_rate_limit_every_step_has_its_line():
    stream = io.StringIO()
    with Progress(stream=stream, min_interval_s=0.0) as progress:
        for step in range(5):
            progress.step(StepRow(step=step, loss=1.0))
    assert len(stream.getvalue().splitlines()) == 5


def test_the_live_table_shows_step_loss_evaluation_and_memory():
    stream = io.StringIO()
    with Progress(target=0.8, expected_steps=1000, stream=stream, live=True) as progress:
        progress.note("compiling 7/12")
        progress.evaluation(EVAL)
        progress.step(FULL)
    text = stream.getvalue()
    for part in ("compiling 7/12", "840 of 1000", "1.873", "lddt 0.781@800→0.800", "fwd 148", "71.4 GiB", "1m06s"):
        assert part in text
