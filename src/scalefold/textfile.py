"""Text files that people write: UTF-8, or one line that says where it is not and how to save it; and JSON from them."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from scalefold.errors import ScaleFoldError


def read_text(path: Path, error: type[ScaleFoldError], what: str = "file") -> str:
    """Content of a UTF-8 file, with or without byte order mark. Raises ``error`` naming file and line."""
    try:
        return decode(path.read_bytes(), path, error)
    except FileNotFoundError:
        raise error(f"{path}: cannot read the {what}: file is missing") from None
    except OSError as problem:
        raise error(f"{path}: cannot read the {what}: {problem.strerror or problem}") from None


def decode(data: bytes, name: object, error: type[ScaleFoldError]) -> str:
    """``data`` as text. Raises ``error`` naming file, line and byte of what is no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        at = problem.start
        line = data.count(b"\n", 0, at) + 1
        raise error(
            f"{name}:{line}: byte {at} (0x{data[at]:02x}) is not UTF-8 text; save the file as "
            f"UTF-8 (if it is Latin-1: iconv -f latin1 -t utf-8 {name} > new_file)"
        ) from None


def parse_json(text: str | bytes) -> Any:
    """The value in JSON text. Whole numbers of more than 40 digits become floats. Raises ValueError only."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 40 else float(digits))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, NaN and infinity included; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number other than NaN and infinity."""
    return is_number(value) and math.isfinite(value)


def replaceable(path: Path, error: type[ScaleFoldError]) -> Path:
    """``path``, if it is absent or a file: a rename onto a folder fails, and one onto a device removes the device.

    Raises ``error`` naming what is there.
    """
    if path.exists() and not path.is_file():
        raise error(f"{path}: is a {'folder' if path.is_dir() else 'device or pipe'}; name a file to write")
    return path


def write_line(file_descriptor: int, line: str) -> None:
    """Append a whole line or nothing: what a full disk takes of it is taken back.

    Raises:
        OSError: the line could not be written.
    """
    data, size = f"{line}\n".encode(), os.fstat(file_descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(file_descriptor, data[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file_descriptor, size)
        raise


def sync(file_descriptor: int) -> None:
    """Have the operating system put a file onto the disk, where what is open lies on one."""
    try:
        os.fsync(file_descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
