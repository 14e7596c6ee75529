"""Pages in a real browser: nothing runs over the side of a phone or a desk, in light and dark, without complaint."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from observed_runs import write_gpu_trace, write_slow_ranks
from report_logs import published_rows, write_result
from scalefold.report.page import write_report
from scalefold.report.record import EvalRow, Record, StepRow

pytestmark = [pytest.mark.browser]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
PREFERENCE = {"light": 1, "dark": 0}  # values of Chromium's preferredColorScheme
WIDTHS = (390, 1280)

# The page lies in a frame of the width that is asked for, because a window has a least width.
FRAME = """<!doctype html><html><body style="margin: 0">
<iframe srcdoc="{page}" style="width: {width}px; height: 3000px; border: 0"></iframe>
<script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe"), page = view.contentDocument, root = page.documentElement;
  const style = view.contentWindow.getComputedStyle(page.body);
  const outside = [...page.body.querySelectorAll("*")].filter(
    e => !e.closest(".scroll") && !e.closest("pre") && !e.closest("svg") && e.getClientRects().length &&
         e.getBoundingClientRect().right > view.clientWidth + 0.5);
  const figures = [...page.querySelectorAll("figure")].map(figure => {{
    const box = figure.querySelector("svg").getBoundingClientRect();
    return {{name: figure.querySelector("h3").textContent, width: box.width, height: box.height,
             shapes: figure.querySelectorAll("svg path, svg use, svg text").length}};
  }});
  const tables = [...page.querySelectorAll(".scroll")].filter(e => e.getClientRects().length).map(e => ({{
    goes_on: e.scrollWidth > e.clientWidth + 1,
    says_so: !!e.previousElementSibling && e.previousElementSibling.classList.contains("more") &&
             e.previousElementSibling.getClientRects().length > 0}}));
  const found = {{scroll: root.scrollWidth, client: root.clientWidth, ground: style.backgroundColor, ink: style.color,
                  outside: outside.map(e => e.outerHTML.slice(0, 120)), figures, tables}};
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}});
</script></body></html>"""


def install_if_missing() -> str:
    """Path of Chromium; installs Debian's package, or skips with the reason."""
    found = shutil.which("chromium")
    if found is None and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        pytest.skip("no chromium, and it cannot be installed here (Debian, root)")
    if found is None:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")
    return shutil.which("chromium") or "chromium"


@pytest.fixture(scope="module")
def browser() -> str:
    return install_if_missing()


def four_organizations(folder: Path) -> Path:
    for submitter in ("NVIDIA", "HPE+LBNL", "TACC", "Clemson"):
        for row in published_rows(submitter):
            place = folder / row["system"] / "strong/openfold"
            place.mkdir(parents=True, exist_ok=True)
            write_result(place / f"result_{row['run']}.txt", row)
    return folder


def one_submitter(folder: Path) -> Path:
    for row in published_rows("NVIDIA"):
        write_result(folder / f"result_{row['run']}.txt", row)
    return folder


def own_run(folder: Path) -> Path:
    with Record(folder, rank0=True) as record:
        record.run(config_name="tiny", target=0.6, environment={"torch": "2.11", "a long name": "x" * 200})
        for step in range(1, 41):
            times = {"step_ms": 300.0 + step, "data_ms": 10.0, "passes": 1 + step % 4, "phases_ms": {"fwd": 80.0}}
            rates = {"lr": 1e-3, "grad_norm": 5.0 / step, "peak_gib": 30.0, "samples": 2 * step, "time_s": float(step)}
            record.step(StepRow(step=step, loss=9.0 / step, terms={"fape": 1.0 / step}, **times, **rates))
        record.evaluation(EvalRow(step=40, samples=80, lddt_ca=0.5, time_s=41.0))
    write_slow_ranks(folder)
    write_gpu_trace(folder)
    (folder / "config.yaml").write_text(f"system: tiny\ndescription: {'long ' * 60}\n")
    return folder


PAGES: dict[str, Callable[[Path], Path]] = {
    "four organizations": four_organizations,
    "one submitter": one_submitter,
    "own run": own_run,
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Text of each page; all details are unfolded, so that they are measured too."""
    texts = {}
    for name, make in PAGES.items():
        folder = tmp_path_factory.mktemp("page")
        (folder / "runs").mkdir()
        log = f"{'/a/long/path' * 12}/result_0.txt"
        check = {"ok": False, "headline": f"the worst is {log}: invalid", "details": f"{log}: {'invalid ' * 40}"}
        files = write_report(make(folder / "runs"), folder / "report.html", check=check)
        texts[name] = files.page.read_text().replace("<details>", "<details open>")
    return texts


def look(browser: str, page: str, width: int, scheme: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What the browser makes of a page: measures, and what it wrote to its console."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(page=html.escape(page), width=width))
    command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width + 200},3200"]
    command += [f"--blink-settings=preferredColorScheme={PREFERENCE[scheme]}", "--virtual-time-budget=10000"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=240)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(match[1])), console


@pytest.mark.parametrize("scheme", PREFERENCE)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window_in_light_and_dark(browser, pages, tmp_path, name, width, scheme):
    found, console = look(browser, pages[name], width, scheme, tmp_path)
    assert console == ""
    assert found["scroll"] <= found["client"] == width
    assert found["outside"] == []
    assert len(found["figures"]) >= 6
    for figure in found["figures"]:
        assert figure["width"] > 250, figure
        assert figure["height"] > 150, figure
        assert figure["shapes"] > 20, figure
    assert all(table["says_so"] is table["goes_on"] for table in found["tables"]), found["tables"]
    assert any(table["goes_on"] for table in found["tables"]) or width > 390
    ground, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("ground", "ink"))
    assert (ground < ink) is (scheme == "dark")


def test_something_too_wide_would_be_noticed(browser, pages, tmp_path):
    wide = pages["own run"].replace("</body>", '<p style="width: 600px">wide</p><script>nothing()</script></body>')
    found, console = look(browser, wide, 390, "light", tmp_path)
    assert found["scroll"] > 390
    assert len(found["outside"]) == 1
    assert "nothing is not defined" in console
