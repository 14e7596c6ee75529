"""No compiled kernel refills a buffer in shared memory that an unfinished product still reads (rings.py)."""

import subprocess
import sys

import pytest

from processes import script_environment

pytest.importorskip("triton")

HEAD = """
module attributes {"ttg.num-warps" = 4 : i32, ttg.target = "cuda:90"} {
  tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %end: i32 loc(#loc)) loc(#loc) {
    %c-1_i32 = arith.constant -1 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c2_i32 = arith.constant 2 : i32 loc(#loc1)
    %slots = arith.constant SLOTS : i32 loc(#loc1)
    %zero = arith.constant dense<0.000000e+00> : tensor<64x64xf32, #mma> loc(#loc1)
    %ring = ttg.local_alloc : () -> !ttg.memdesc<SLOTSx64x64xbf16, #shared, #smem, mutable> loc(#loc2)
    %other = ttg.local_alloc : () -> !ttg.memdesc<64x64xbf16, #shared, #smem, mutable> loc(#loc2)
"""
LOOP = """
    %acc:3 = scf.for %i = %c0_i32 to %end step %c1_i32 iter_args(%sum = %zero, %into = %c1_i32, %from = %c-1_i32) -> (tensor<64x64xf32, #mma>, i32, i32)  : i32 {
      %from_1 = arith.addi %from, %c1_i32 : i32 loc(#loc3)
      %wraps = arith.cmpi sge, %from_1, %slots : i32 loc(#loc3)
      %from_2 = arith.select %wraps, %c0_i32, %from_1 : i32 loc(#loc3)
      %d = ttg.memdesc_index %ring[%from_2] : !ttg.memdesc<SLOTSx64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#loc3)
      %t = ttg.memdesc_trans %d {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#loc3)
      %p = ttng.warp_group_dot %t, %other, %sum {isAsync = true} : !ttg.memdesc<64x64xbf16> * !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma> loc(#loc3)
      %done:2 = ttng.warp_group_dot_wait %p, %t {pendings = PENDING : i32} : tensor<64x64xf32, #mma>, !ttg.memdesc<64x64xbf16> loc(#loc3)
      %into_1 = arith.addi %into, %c1_i32 : i32 loc(#loc3)
      %wraps_1 = arith.cmpi sge, %into_1, %slots : i32 loc(#loc3)
      %into_2 = arith.select %wraps_1, %c0_i32, %into_1 : i32 loc(#loc3)
      %next = ttg.memdesc_index %ring[%into_2] : !ttg.memdesc<SLOTSx64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#loc3)
      %token = ttg.async_copy_global_to_local %x, %next mask %zero {contiguity = 8 : i32} : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#loc3)
      scf.yield %done#0, %into_2, %from_2 : tensor<64x64xf32, #mma>, i32, i32 loc(#loc3)
    } loc(#loc3)
    %all = ttng.warp_group_dot_wait %acc#0 {pendings = 0 : i32} : tensor<64x64xf32, #mma> loc(#loc3)
"""  # noqa: E501
STORED = """
    scf.for %i = %c0_i32 to %end step %c1_i32  : i32 {
      %p = ttng.warp_group_dot %other, %other, %zero {isAsync = true} : !ttg.memdesc<64x64xbf16> * !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma> loc(#loc3)
      %sum = "tt.reduce"(%zero) <{axis = 0 : i32}> ({
      ^bb0(%a: f32 loc(#loc), %b: f32 loc(#loc)):
        %s = arith.addf %a, %b : f32 loc(#loc3)
        tt.reduce.return %s : f32 loc(#loc3)
      }) : (tensor<64x64xf32, #mma>) -> tensor<64xf32> loc(#loc3)
      ttg.local_store %zero, %other : tensor<64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#loc3)
    } loc(#loc3)
"""  # noqa: E501
TAIL = """
    ttg.local_dealloc %ring : !ttg.memdesc<SLOTSx64x64xbf16> loc(#loc3)
    tt.return loc(#loc3)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("kernel.py":7:9)
"""


def program(*parts: str, slots: int = 3, pending: int = 1) -> str:
    """A module that computes nothing; copies run two turns ahead, as the pipeliner writes them."""
    text = "".join((HEAD, *parts, TAIL))
    return text.replace("SLOTS", str(slots)).replace("PENDING", str(pending))


@pytest.fixture
def rings():
    """The module."""
    from scalefold.kernels.compiled import rings

    return rings


def test_a_ring_with_a_slot_for_the_unfinished_product_is_sound(rings):
    assert rings.ring_faults(program(LOOP, slots=3)) == []


@pytest.mark.parametrize("slots", [1, 2])
def test_a_ring_that_is_a_slot_short_is_named(rings, slots):
    faults = rings.ring_faults(program(LOOP, slots=slots))
    assert len(faults) == slots  # the masked copies come round to each of them
    assert f"to slot 0 of %ring ({slots}x64x64) while a product reads it" in faults[0]


def test_a_short_ring_is_sound_where_each_product_is_waited_for(rings):
    assert rings.ring_faults(program(LOOP, slots=2, pending=0)) == []


def test_a_loop_without_a_wait_is_named(rings):
    faults = rings.ring_faults(program(LOOP.replace("PENDING", "9"), slots=3))
    assert any("slot 2" in fault for fault in faults)


def test_names_that_return_in_another_branch_are_other_rings(rings):
    """Launches of several products have one branch each, and the printer numbers names from the start in each."""
    ring = "    %ring = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xbf16> loc(#loc2)\n"
    branch = f"    scf.if %unknown {{\n{ring}{LOOP}    }} loc(#loc)\n"
    assert rings.ring_faults(program(branch, branch, branch)) == []
    assert rings.ring_faults(program(branch, branch.replace("%slots", "%c2_i32"), branch))


def test_a_store_into_what_a_product_reads_is_named(rings):
    assert rings.ring_faults(program(STORED)) == [
        "ttg.local_store to slot None of %other (64x64) while a product reads it"
    ]


def test_a_buffer_given_back_under_a_product_is_named(rings):
    last = "    %all = ttng"
    assert any("local_dealloc" in fault for fault in rings.ring_faults(program(LOOP.split(last)[0])))


def test_a_program_that_cannot_be_followed_is_refused(rings):
    with pytest.raises(ValueError, match=r"scf\.while cannot be judged"):
        rings.ring_faults(program("    %w = scf.while : () -> () {\n    } do {\n    } loc(#loc)\n"))


def test_gluon_programs_of_several_groups_of_warps_are_not_judged(rings):
    groups = "    ttg.warp_specialize(%x)\n    default {\n" + STORED + "    } : () -> () loc(#loc)\n"
    assert rings.ring_faults(program(groups)) == []


def test_refills_after_a_wait_need_a_barrier_where_other_warps_multiply_too(rings):
    lines = ["wgmma.wait_group.sync.aligned 1;", "add.s32 %r1, %r2, 1;", "cp.async.cg.shared.global [%r1], [%rd2], 16;"]
    assert rings.unguarded_refills("\n".join(lines), 8) == [
        "copy in line 3 after the wait in line 1, no barrier between"
    ]
    assert rings.unguarded_refills("\n".join(lines), 4) == []
    lines.insert(1, "bar.sync 0;")
    assert rings.unguarded_refills("\n".join(lines), 8) == []


KERNEL = '''
import sys
import torch, triton
import triton.language as tl
import compile_targets
from scalefold.kernels.compiled.rings import ring_faults

@triton.jit
def summed(d, weight, out, sums, N: tl.constexpr, STAGES: tl.constexpr):
    """acc += d W, and column sums of the same tile of d: the form of triton-lang/triton#6691."""
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    acc = tl.zeros([64, 64], tl.float32)
    for start in tl.range(0, N, 64, num_stages=STAGES):
        n = start + tl.arange(0, 64)
        tile = tl.load(d + rows[:, None] * N + n[None, :])
        acc = tl.dot(tile, tl.load(weight + n[:, None] * 64 + tl.arange(0, 64)[None, :]), acc)
        ones = tl.full([16, 64], 1.0, tl.float32).to(tl.bfloat16)
        line = tl.arange(0, 16)
        tl.store(sums + n[None, :] + 0 * line[:, None], tl.dot(ones, tile), mask=(line == 0)[:, None])
    tl.store(out + rows[:, None] * 64 + tl.arange(0, 64)[None, :], acc)

def faults(stages):
    empty = [torch.empty(512, 512, dtype=t, device="meta") for t in (torch.bfloat16,) * 2 + (torch.float32,) * 2]
    with compile_targets.recorded_launches() as launches:
        summed[(8,)](*empty, N=512, STAGES=stages, num_warps=4)
    return ring_faults(compile_targets.compile_launch(launches[0], 90).asm["ttgir"])

print(len(faults(3)), len(faults(2)), len(faults(1)))
'''


def test_the_compiler_s_fault_is_found_in_a_kernel_that_has_it(repository, tmp_path):
    """It may be repaired some day: then the limit in ``linear._add_products`` may go, and this test with it."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    finished = subprocess.run(
        [sys.executable, str(tmp_path / "kernel.py")],
        env=script_environment(repository, tmp_path / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    three, two, one = map(int, finished.stdout.split())
    assert three
    assert two  # fewer stages hide the fault, and do not end it
    assert not one


def test_no_shipped_projection_is_compiled_wrong_at_the_shapes_of_one_gpu(repository, tmp_path):
    """Where the fault was found; ``make rings`` judges all operations, at every share and length of evaluation."""
    finished = subprocess.run(
        [sys.executable, "benchmarks/measure/compile_targets.py", "--faults", "--only", "linear 1x256x256"],
        cwd=repository,
        env=script_environment(repository, tmp_path / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert ": 0 faulty" in finished.stdout
