"""Kernels that an assembler makes wrong are found in their machine code, and refused where they are compiled."""

import subprocess
import sys
from pathlib import Path

import pytest

from processes import script_environment

pytest.importorskip("triton")

from scalefold.errors import KernelError
from scalefold.kernels.compiled import ahead
from scalefold.kernels.compiled.machine_code import unwritten_reads


def listing(*instructions: str) -> str:
    """As the disassembler prints them, sixteen bytes each."""
    lines = [f"        /*{16 * n:04x}*/       {text} ;   /* 0x000 */" for n, text in enumerate(instructions)]
    return "\n".join(["\t\tFunction : kernel", *lines])


def registers(*instructions: str) -> list[int]:
    """Numbers of the uniform registers that are named, one per line."""
    return [int(line.split(" reads UR")[1].split(",")[0]) for line in unwritten_reads(listing(*instructions))]


SUM = "UIADD3 UR10, UP0, UR20, 0x20, URZ"
MADE = "USGXT.U32 UR20, UR4, 0xe"
LOADED = "ULDC UR4, c[0x0][0x208]"


def test_a_sum_in_front_of_its_operand_is_named():
    (line,) = unwritten_reads(listing(LOADED, SUM, MADE, "EXIT"))
    assert line == f"{SUM} at 0x10 reads UR20, which nothing has written"
    assert registers(LOADED, MADE, SUM, "EXIT") == []


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (("ULDC.64 UR4, c[0x0][0x208]", "UIADD3 UR6, UR4, UR5, URZ", "EXIT"), []),  # both of a pair
        (("ULDC UR4, c[0x0][0x208]", "UIADD3 UR6, UR4, UR5, URZ", "EXIT"), [5]),
        (("R2UR UR8, R3", "FMUL R86, R86, UR8", "EXIT"), []),
        (("R2UR.OR P1, UR6, R4", "UMOV UR5, UR6", "EXIT"), []),  # a predicate and a register
        (("ULOP3.LUT UP0, UR4, UR5, 0x1, URZ, 0xc0, !UPT", "UMOV UR6, UR4", "EXIT"), [5]),
        (("FMUL R86, R86, UR8", "EXIT"), [8]),
        (("LDG.E R2, desc[UR4][R6.64]", "EXIT"), [4, 5]),
        (("UISETP.NE.AND UP0, UPT, UR5, URZ, UPT", "EXIT"), [5]),
        (("@UP0 UMOV UR5, 0x1", "UIADD3 UR6, UR5, 0x1, URZ", "EXIT"), []),  # under a condition: taken as written
        (("UBLKCP [UR4], [UR6], UR8", "EXIT"), [4, 6, 8]),
        (("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", "EXIT"), [8, 9, 10, 11]),
        (("HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR8].tnspB, R24", "EXIT"), [10, 11]),  # left operand in registers
    ],
    ids=str,
)
def test_what_instructions_write_and_read(instructions, expected):
    assert registers(*instructions) == expected


def test_every_path_is_followed():
    use = "UIADD3 UR6, UR5, 0x1, URZ"
    skipped = ("@P0 BRA 0x20", "UMOV UR5, 0x1", use, "EXIT")
    assert registers(*skipped) == [5]
    assert registers("UMOV UR5, 0x1", "@P0 BRA 0x30", "NOP", use, "EXIT") == []
    loop = (use, "UMOV UR5, 0x1", "@P0 BRA 0x0", "EXIT")  # the first round reads it, the second would find it
    assert registers(*loop) == [5]
    assert registers("BRA 0x20", use, "EXIT") == []  # never reached
    meeting = ("BSSY B0, 0x40", "@P0 BRA 0x30", "UMOV UR5, 0x1", "BSYNC B0", use, "EXIT")
    assert registers(*meeting) == [5]
    assert registers("UMOV UR5, 0x1", *(meeting[0].replace("0x40", "0x50"), "@P0 BRA 0x40"), *meeting[2:]) == []


def test_functions_are_judged_one_by_one():
    other = listing("UMOV UR5, 0x1", "EXIT")
    assert unwritten_reads(f"{other}\n{listing('FMUL R1, R1, UR5', 'EXIT')}") != []
    assert unwritten_reads("") == []


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of a kernel in Triton's cache."""
    files = {f"kernel.{kind}": tmp_path / f"kernel.{kind}" for kind in ("json", "ttgir", "ptx", "cubin")}
    for file in files.values():
        file.write_text("")
    monkeypatch.setattr(ahead, "disassembled", lambda cubin: "")
    return {name: str(file) for name, file in files.items()}


def test_a_faulty_kernel_is_refused_and_leaves_the_cache(compiled, monkeypatch):
    monkeypatch.setattr(ahead, "faults", lambda *outputs: ["UIADD3 at 0x10 reads UR20"])
    with pytest.raises(KernelError, match=r"kernel summed: UIADD3 at 0x10 reads UR20: .*TRITON_PTXAS_PATH"):
        ahead.refuse_faults({"name": "summed", "num_warps": 4}, compiled)
    assert [name for name, file in compiled.items() if not Path(file).exists()] == ["kernel.json"]


def test_a_kernel_without_faults_stays(compiled, monkeypatch):
    monkeypatch.setattr(ahead, "faults", lambda *outputs: [])
    ahead.refuse_faults({"name": "summed", "num_warps": 4}, compiled)
    assert all(Path(file).exists() for file in compiled.values())
    ahead.refuse_faults({"name": "interpreted", "num_warps": 4}, {"kernel.json": compiled["kernel.json"]})


def test_without_a_disassembler_kernels_run_and_the_log_says_so(compiled, monkeypatch, caplog):
    def missing(cubin):
        raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(ahead, "disassembled", missing)
    with caplog.at_level("INFO", "scalefold"):
        ahead.refuse_faults({"name": "summed", "num_warps": 4}, compiled)
    assert "not looked through for faults of compilers: Cannot find cuobjdump" in caplog.text
    assert all(Path(file).exists() for file in compiled.values())


TEMPLATES = """
import sys
import compile_targets, torch
from scalefold.errors import KernelError
from scalefold.kernels import tuning
from scalefold.kernels.around import templates
from scalefold.kernels.compiled.ahead import counting

def leaf(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

def launches(c_z, c_t, inner):
    z, t = leaf(1, 90, 90, c_z), leaf(1, 4, 90, 90, c_t)
    weights = [leaf(inner, c_z), leaf(inner, c_t), leaf(inner, c_t), leaf(c_z, inner)]
    with tuning.assume_capability(90), compile_targets.recorded_launches() as found:
        out = templates.add_templates(z, t, torch.empty(1, 4, device="meta"), weights, leaf(c_z), 4, 1e5)
        out.backward(torch.empty_like(out))
    return [launch for launch in found if launch.kernel.fn.__module__ == templates.__name__]

for c_z, c_t, inner in SHAPES:
    for launch in launches(c_z, c_t, inner):
        print(c_z, c_t, inner, compile_targets.faults_of(compile_targets.compile_launch(launch, 90)))
(large,) = [launch for launch in launches(32, 16, 64) if launch.kernel.fn.__name__ == "_input_gradient_kernel"]
large.options["BLOCK_M"] = 64
with counting() as count:
    for _ in range(2):
        try:
            compile_targets.compile_launch(large, 90)
        except KernelError as error:
            print("refused", error)
print(count.hits, count.misses)
"""


def compiled_templates(repository: Path, tmp_path: Path, shapes: list[tuple[int, int, int]]) -> list[str]:
    """Lines that ``TEMPLATES`` prints."""
    environment = script_environment(repository, tmp_path / "cache")
    command = [sys.executable, "-c", f"SHAPES = {shapes}\n{TEMPLATES}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_assembler_s_fault_is_refused_whenever_it_is_compiled(repository, tmp_path):
    """It may be repaired some day: then ``templates._sizes`` may take large tiles at all widths, and this test go."""
    *faults, first, second, count = compiled_templates(repository, tmp_path, [(32, 16, 64)])
    assert faults
    assert all(line.endswith("[]") for line in faults)  # of the tiles that are taken there
    assert first == second
    assert first.startswith("refused kernel _input_gradient_kernel: ")
    assert count == "0 0"


@pytest.mark.long
def test_attention_over_templates_is_compiled_right_at_all_widths(repository, tmp_path):
    shapes = [(c_z, c_t, inner) for c_z in (32, 64, 128) for c_t in (16, 32, 64) for inner in (16, 32, 64)]
    *faults, _, _, _ = compiled_templates(repository, tmp_path, shapes)
    assert len(faults) >= 3 * len(shapes)
    assert [line for line in faults if not line.endswith("[]")] == []
