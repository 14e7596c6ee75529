"""Text files that people write: UTF-8, or one line that says where it is not and how to save it."""

from pathlib import Path

from scalefold.errors import ScaleFoldError


def read_text(path: Path, error: type[ScaleFoldError]) -> str:
    """Content of a UTF-8 file, with or without byte order mark. Raises ``error`` naming file and line."""
    try:
        return decode(path.read_bytes(), path, error)
    except FileNotFoundError:
        raise error(f"{path}: cannot read: the file is missing") from None
    except OSError as problem:
        raise error(f"{path}: cannot read: {problem.strerror or problem}") from None


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
