"""Kernels compiled without their GPU: the running program must find them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends.nvidia import driver as nvidia

from processes import compiling_environment
from scalefold.config import load_config
from scalefold.errors import ConfigError
from scalefold.node_findings import kernel_cache_rows, rdma_rows
from scalefold.run.compile_ahead import capability_of, compile_kernels, write_manifest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FEW = ["execution.kernels=triton", "data.val_max_sequence_length=16", "data.eval_length_multiple=16"]

COMPILE = """
import torch
from scalefold.kernels.choice import operations
from scalefold.kernels.compiled.ahead import compiling_for
ops, device = operations("triton"), torch.device("meta")
with compiling_for(90) as count:
    CALL
print(count.hits, count.misses, *sorted(count.folders))
"""

# What a program on a GPU does, up to the launch: real tensors with real addresses, Triton's own way to the cache; the
# driver answers as one of that GPU would, and the launch itself is left out.
RUN = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from scalefold.kernels import triton_ops
from scalefold.kernels.choice import operations
from scalefold.kernels.compiled.ahead import counting
class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
driver.set_active(Driver())
CompiledKernel.run = property(lambda self: lambda *arguments: None)
CompiledKernel.launch_metadata = lambda self, *arguments: None
CompiledKernel.function = 0
triton_ops.device_obstacle = lambda device: None
ops, device = operations("triton"), torch.device("cpu")
with counting() as count:
    CALL
print(count.hits, count.misses, *sorted(count.folders))
"""

LAYER_NORM = """
    x = torch.zeros(1, 64, 64, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
    w, b = (torch.zeros(128, device=device, requires_grad=True) for _ in range(2))
    ops.layer_norm(x, w, b).backward(torch.zeros_like(x))
"""
# Heads of one projection, as the model has them: of rows with gradients, and of columns in a pass without them. The
# forward and the keys' gradients are Gluon programs.
ATTENTION = """
    x = torch.zeros(1, 64, 256, 3 * 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.zeros(1, 8, 256, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    q, k, v = (part.unflatten(-1, (8, 32)) for part in x.chunk(3, -1))
    mask = torch.zeros(1, 64, 256, dtype=torch.bfloat16, device=device)
    ops.attention(q, k, v, mask, bias, 1e9).backward(torch.zeros(1, 64, 256, 8, 32, dtype=x.dtype, device=device))
    x = torch.zeros(1, 128, 64, 3 * 256, dtype=torch.bfloat16, device=device).transpose(1, 2)
    q, k, v = (part.unflatten(-1, (8, 32)) for part in x.chunk(3, -1))
    ops.attention(q, k, v, torch.zeros(1, 64, 128, dtype=x.dtype, device=device), None, 1e9)
"""


# Recorded first, then compiled by two processes, of which those that are forked may meet a fault.
BY_TWO = """
import os, signal, sys, triton.knobs
from pathlib import Path
import torch
from scalefold.kernels.compiled import ahead
from scalefold.kernels.choice import operations
ops, device = operations("triton"), torch.device("meta")
parent, compile_it = os.getpid(), ahead.Wanted.compile
def compile_or_die(self):
    if os.getpid() != parent and self.name.endswith("DEADLY"):
        folder = Path(triton.knobs.cache.dir) / "A" / f"tmp.pid_{os.getpid()}_1"
        folder.mkdir(parents=True)
        (folder / "half.cubin").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    compile_it(self)
ahead.Wanted.compile = compile_or_die
with ahead.compiling_for(90):
    with ahead.only_recorded() as wanted:
        CALL
    count = ahead.compile_wanted(wanted.values(), 2, lambda text: print(text, file=sys.stderr))
print(count.hits, count.misses, *sorted(count.folders))
"""
BROKEN = """
import triton
import triton.language as tl
@triton.jit
def never_compiles(x):
    tl.static_assert(False)
"""
KEYS = """
import gc, random
from triton.runtime.jit import JITFunction
from scalefold.kernels import triton_ops
programs = [one for one in gc.get_objects() if isinstance(one, JITFunction) and "scalefold" in one.fn.__module__]
programs.sort(key=lambda one: (one.fn.__module__, one.fn.__name__), reverse=BACKWARD)
print(*sorted(one.cache_key for one in programs))
"""


def run_python(text: str, cache: Path) -> list[str]:
    """Run a program in a process of its own, without the interpreter that other tests use; what it prints, as words."""
    done = started(text, cache)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def started(text: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    environment = compiling_environment(cache)
    return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)


def files_of(cache: Path) -> set[str]:
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


def test_a_kernel_has_one_key_whatever_was_asked_for_before_it(tmp_path: Path) -> None:
    forward, backward = (run_python(KEYS.replace("BACKWARD", word), tmp_path) for word in ("False", "True"))
    assert len(forward) > 100
    assert forward == backward


@pytest.mark.parametrize("deadly", ["no kernel", "_backward_kernel"])
def test_two_processes_compile_what_one_does_also_if_one_of_them_is_killed(deadly: str, tmp_path: Path) -> None:
    by_one = run_python(COMPILE.replace("    CALL", LAYER_NORM.strip("\n")), tmp_path / "one")
    call = LAYER_NORM.replace("\n    ", "\n        ").strip("\n")
    done = started(BY_TWO.replace("        CALL", call).replace("DEADLY", deadly), tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == by_one
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one"), "nothing half-written is left"
    assert f"{len(by_one) - 2} of {len(by_one) - 2} kernels" in done.stderr
    died = "the process that compiled scalefold.kernels.ops.layer_norm._backward_kernel ended: status -9"
    assert (died in done.stderr) == (deadly != "no kernel")


def test_a_kernel_that_does_not_compile_is_named_by_one_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    call = LAYER_NORM.replace("\n    ", "\n        ").strip("\n")
    call = f"        sys.path.append({str(tmp_path)!r}); import broken\n{call}"
    call += "\n        broken.never_compiles[(1,)](x)"
    done = started(BY_TWO.replace("        CALL", call), tmp_path / "cache")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("this was the kernel broken.never_compiles")
    assert not [name for name in files_of(tmp_path / "cache") if "tmp.pid" in name]


@pytest.mark.long
@pytest.mark.parametrize(
    ("call", "programs"), [(LAYER_NORM, {"_backward_kernel": 1}), (ATTENTION, {"hopper_forward": 2, "hopper_keys": 1})]
)
def test_what_is_compiled_ahead_is_what_a_program_on_that_gpu_looks_up(
    call: str, programs: dict[str, int], tmp_path: Path
) -> None:
    cache = tmp_path / "compiled"
    compile_it, run_it = (text.replace("    CALL", call.strip("\n")) for text in (COMPILE, RUN))
    hits, misses, *folders = run_python(compile_it, cache)
    assert [len(list(cache.glob(f"*/{name}.cubin"))) for name in programs] == [*programs.values()]
    assert (hits, int(misses) > 1, len(folders)) == ("0", True, int(misses))
    own_launchers = hasattr(nvidia, "make_launcher")  # else one serves all kernels, and there is nothing to compile
    assert bool(list(cache.glob("*/__triton_launcher*.so"))) == own_launchers
    assert run_python(run_it, cache) == [misses, "0", *folders], "every kernel is a hit"
    moved = hand_to_node(cache, tmp_path / "node")
    cache.rename(tmp_path / "elsewhere")
    assert run_python(run_it, moved) == [misses, "0", *folders], "also in the node's own cache, without the first"


#: The benchmark's widths, one block of each kind, few rows.
ONE_BLOCK = (
    *(f"model.{stack}.num_blocks=1" for stack in ("evoformer", "extra_msa", "template")),
    *("model.structure.num_blocks=2", "data.train_sequence_crop_size=64", "data.max_msa_clusters=32"),
    *("data.max_extra_msa=64", "data.num_recycling_iters=1", "training.global_batch_size=2"),
    *("data.val_max_sequence_length=64", "training.init_checkpoint=null"),
)
OPERATIONS = (
    "adam_swa",
    "attention_programs",
    "elementwise",
    "gated_output",
    "global_attention_programs",
    "layer_norm",
)
OPERATIONS += ("linear", "outer_product", "point_attention", "point_errors", "transition", "triangle")


def kernel_keys(way: str, *overrides: str) -> dict[str, list[str]]:
    """What ``kernel_keys.py`` prints: under which keys Triton would file the kernels."""
    tests = Path(__file__).parent
    environment = compiling_environment()
    command = [sys.executable, str(tests / "kernel_keys.py"), way, str(CONFIGS / "h100_1x1.yaml"), *ONE_BLOCK]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("dap_size", [1, 2])
def test_all_operations_of_a_run_ask_for_the_kernels_that_were_compiled_ahead(dap_size: int) -> None:
    shape = (f"parallel.gpus_per_node={dap_size}", f"parallel.dap_size={dap_size}")
    ahead, launched = kernel_keys("ahead", *shape), kernel_keys("launched", *shape)
    assert {name.split(".")[-2] for name in launched} >= set(OPERATIONS)
    assert any("hopper_projections" in name for name in launched), "Gluon programs are among them"
    assert sum(map(len, launched.values())) > 100
    missing = {name: set(keys) - set(ahead.get(name, [])) for name, keys in launched.items()}
    assert {name: keys for name, keys in missing.items() if keys} == {}, "a run would compile these on the clock"
    assert ahead.keys() == launched.keys(), "compiled for nothing"


def hand_to_node(compiled: Path, node: Path) -> Path:
    """What launch/run.sh does with ``launch.compiled_dir``; returns the node's Triton cache."""
    environment = os.environ | {"SCALEFOLD_CACHE_DIR": str(node), "SCALEFOLD_COMPILED_DIR": str(compiled)}
    subprocess.run([CONFIGS.parent / "launch" / "run.sh", "true"], env=environment, check=True)
    return node / "triton"


@pytest.mark.long
def test_a_whole_configuration_is_compiled_with_its_share_of_a_dap_group(tmp_path: Path) -> None:
    out, shape = tmp_path / "compiled", ["parallel.ranks_per_node=2", "parallel.dap_size=2"]
    command = [sys.executable, "-m", "scalefold", "compile", "--gpu", "H100", "--workers", "2", "--out", str(out)]
    environment = compiling_environment()
    done = subprocess.run(
        [*command, "--config", str(CONFIGS / "tiny.yaml"), *FEW, *shape],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert " 0 were there, " in done.stdout
    (row,) = kernel_cache_rows(out)
    assert row[:2] == ("ok", "kernels")
    assert row[2].startswith("tiny_cpu sm_90: ")
    assert " 0 misses in " in row[2]


def test_doctor_counts_what_a_cache_has_lost_and_what_another_triton_cannot_use(tmp_path: Path) -> None:
    assert "holds none" in kernel_cache_rows(tmp_path)[0][2]
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.cubin").touch()
    write_manifest(tmp_path, "one sm_90", {"A", "B"})
    write_manifest(tmp_path, "two sm_80", {"A", "C"})
    rows = kernel_cache_rows(tmp_path)
    assert [row[0] for row in rows] == ["ok", "note"]
    assert rows[0][2].startswith("one sm_90: 2 hits, 0 misses")
    assert rows[1][2].startswith("two sm_80: 1 hits, 1 misses")
    assert kernel_cache_rows(tmp_path, triton_version="0")[0][2].startswith("one sm_90: 0 hits, 2 misses")


@pytest.mark.parametrize(
    ("overrides", "gpu", "message"),
    [
        ([], "V100", "--gpu V100: must be one of A100"),
        ([], "H100", "execution.kernels is reference"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides: list[str], gpu: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_kernels(load_config(CONFIGS / "tiny.yaml", overrides).config, gpu, tmp_path)


def test_gpus_are_known_by_their_short_or_long_names() -> None:
    assert [capability_of(name) for name in ("A100-SXM-80GB", "h100", "GH200")] == [80, 90, 90]
    assert [capability_of(name) for name in ("B200-SXM-180GB", "gb200")] == [100, 100]


def test_doctor_says_what_is_missing_for_rdma(tmp_path: Path) -> None:
    cards, devices = tmp_path / "infiniband", tmp_path / "dev"
    assert "no InfiniBand or RoCE card" in rdma_rows(cards, devices)[0][2]
    (cards / "mlx5_0").mkdir(parents=True)
    assert "MELLANOX_VISIBLE_DEVICES=all" in rdma_rows(cards, devices, lambda name: True)[0][2]
    devices.mkdir()
    (devices / "uverbs0").touch()
    assert "libmlx5.so.1 (Debian: ibverbs-providers)" in rdma_rows(cards, devices, lambda name: False)[0][2]
    assert rdma_rows(cards, devices, lambda name: True)[0][:2] == ("ok", "rdma")
