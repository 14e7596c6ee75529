"""Repairs of Triton 3.6's interpreter, in which the kernel tests run where there is no GPU."""

from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def repair() -> None:
    """Let loops take run-time bounds under NumPy >= 2.4, bf16 be numbers that are rounded, and calls be quick."""
    _repair_scalars()
    _repair_calls()
    _repair_types()
    _repair_bfloat16_dot()
    _repair_bfloat16_rounding()


def _repair_scalars() -> None:
    """NumPy 2.4 refuses int() of a one-element array, which the interpreter does for bounds of loops."""
    patch = interpreter._patch_lang_tensor

    def patch_then_repair(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_then_repair


def _repair_calls() -> None:
    """Within a launch the interpreter exchanges the whole language again at every call, be it ``tl.sum``.

    Here it is exchanged once per launch, for programs and for the library of functions that they call.
    """
    patch, parts = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    under_way: list[interpreter._LangPatchScope] = []

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            under_way.pop().restore()

    def patch_once(fn: object) -> interpreter._LangPatchScope:
        if under_way:
            return interpreter._LangPatchScope()
        under_way.append(patch(parts))
        return Launch()

    interpreter._patch_lang = patch_once


def _repair_types() -> None:
    """The interpreter writes down the table of all types whenever it asks for the one of NumPy."""
    find, known = interpreter._get_np_dtype, dict[str, np.dtype]()

    def found(dtype: tl.dtype) -> np.dtype:
        if isinstance(dtype.scalar, tl.pointer_type):
            return find(dtype)
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = found


def _to_float32(handle: TensorHandle) -> np.ndarray:
    """Numbers of a handle; bf16 is stored as the upper half of fp32 in uint16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _repair_bfloat16_dot() -> None:
    """The interpreter multiplies the stored uint16 codes of bf16 operands."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(_to_float32(a), _to_float32(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _repair_bfloat16_rounding() -> None:
    """The interpreter cuts fp32 to bf16 where a GPU rounds to nearest even, and is slow in both directions."""
    convert = interpreter._convert_float

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.bfloat16 and output_dtype == tl.float32:
            return data.astype(np.uint32) << 16
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return convert(data, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)

    interpreter._convert_float = convert_float
