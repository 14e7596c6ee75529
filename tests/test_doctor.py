"""What the doctor says of a machine."""

import pytest

from scalefold import doctor
from scalefold.doctor import PAIRS, _compiler, _mpi, _peers, examine, kind_findings, pair_finding


def test_this_machine_is_examined_and_can_run() -> None:
    found = {finding.topic: finding for finding in examine()}
    assert {"python", "torch", "mpi4py", "C compiler", "cpu", "triton cache"} <= set(found)
    assert not [finding for finding in found.values() if finding.level == "problem"]


def test_gpus_that_cannot_read_each_others_memory_are_named() -> None:
    assert _peers(1, lambda a, b: False) == []
    assert [finding.level for finding in _peers(4, lambda a, b: True)] == ["ok"]
    (note,) = _peers(3, lambda a, b: {a, b} != {0, 2})
    assert note.level == "note"
    assert note.text.startswith("cuda:0 cannot read the memory of cuda:2")


CUDA_BUILD = ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(("name", "memory"), [("NVIDIA B200", "180 GB"), ("NVIDIA GB200", "186 GB")])
def test_a_blackwell_gpu_gets_its_vendors_figures_and_what_its_owner_does_first(name: str, memory: str) -> None:
    vendor, kernels = kind_findings(name, (10, 0), CUDA_BUILD)
    assert (vendor.level, vendor.topic, kernels.level) == ("note", name.removeprefix("NVIDIA "), "note")
    assert vendor.text.startswith("vendor's figures for ")
    assert f"nothing measured: {memory}" in vendor.text
    assert "(NVIDIA: " in vendor.text
    assert kernels.text.startswith("kernels compile for compute 10.0, none was timed on this GPU: `make bench-gpu`")


def test_measured_kinds_of_gpu_need_no_word_and_capabilities_that_nobody_compiled_for_are_warned_of() -> None:
    assert kind_findings("NVIDIA H100 80GB HBM3", (9, 0), CUDA_BUILD) == []
    (warning,) = kind_findings("NVIDIA RTX PRO 6000", (12, 0), CUDA_BUILD)
    assert (warning.level, "known: 8.0, 9.0, 10.0" in warning.text) == ("warning", True)


def test_a_pytorch_without_programs_for_the_gpu_is_a_problem() -> None:
    problem, *_ = kind_findings("NVIDIA B200", (10, 0), ["sm_50", "sm_80", "sm_90"])
    assert problem.level == "problem"
    assert problem.text.startswith("this PyTorch has no programs for compute 10.0, only sm_50 sm_80 sm_90")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.torch)
def test_a_pair_that_was_tried_is_said_to_be_measured_or_only_tested(pair: doctor.Pair) -> None:
    for build in ("", "+cpu", "+cu130"):
        _, finding = pair_finding(pair.torch + build, pair.triton)
        assert finding.level == "ok"
        assert finding.text.startswith({"measured": "the measured pair", "tested": "tested, not measured"}[pair.tried])


@pytest.mark.parametrize("versions", [("2.13.0+cpu", "3.6.0"), ("2.11.0", "3.7.1"), ("2.99.0", "3.99.0")])
def test_every_other_pair_is_a_warning_that_names_the_known_ones(versions: tuple[str, str]) -> None:
    _, finding = pair_finding(*versions)
    assert finding.level == "warning"
    assert all(f"{pair.torch} + {pair.triton} ({pair.tried})" in finding.text for pair in PAIRS)


@pytest.mark.parametrize(("system", "level"), [("Linux", "warning"), ("Darwin", "note")])
def test_a_machine_without_triton_can_run_with_plain_operations(
    system: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    (finding,) = pair_finding("2.13.0", None)
    assert finding.level == level
    assert "plain PyTorch operations" in finding.text


def test_an_mpi_library_is_missed_only_for_what_needs_it() -> None:
    assert _mpi("4.1.2", True) == doctor.Finding("ok", "mpi4py", "4.1.2")
    assert _mpi("4.1.2", False).text == "4.1.2 without an MPI library; only mpirun and `prepare --mpi` need both"
    assert _mpi(None, False).level == "note"


@pytest.mark.parametrize(("gpu", "level"), [(True, "problem"), (False, "note")])
def test_a_missing_compiler_is_a_problem_only_beside_a_gpu(
    gpu: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: gpu)
    assert _compiler().level == level
    assert _compiler().text.startswith("no C compiler")


def test_a_mac_which_cannot_bind_processes_to_cores_is_examined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    (cpu,) = (finding for finding in examine() if finding.topic == "cpu")
    assert cpu.text.split()[0].isdigit()
