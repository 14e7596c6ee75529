"""Reading raw files, plain or gzip, with errors that name the file."""

import gzip
import zlib
from pathlib import Path

from scalefold.errors import DataError


def read_bytes(path: Path) -> bytes:
    """Content of a plain or ``.gz`` file. Raises DataError naming the file if it is missing or cut off."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from error
