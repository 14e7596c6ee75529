"""Reading raw files, plain or compressed, with errors that name the file."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable
from typing import Protocol

from scalefold.errors import DataError


class RawText(Protocol):
    """A file, or a stretch of a shard: what the readers use of a path."""

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    def read_bytes(self) -> bytes: ...


class RawFolder(Protocol):
    """An alignment folder, or its stretch of a shard."""

    @property
    def name(self) -> str: ...

    def glob(self, pattern: str) -> Iterable[RawText]: ...


#: Endings of compressed files that are read.


COMPRESSIONS = (".gz", ".bz2", ".xz")
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAX_TEXT_BYTES = 1 << 30  # far above every real structure or alignment; a small file may unpack to any size


def read_bytes(path: RawText) -> bytes:
    """Content of a plain, ``.gz``, ``.bz2`` or ``.xz`` file. Raises DataError naming a file that is missing or bad."""
    try:
        data = path.read_bytes()
        if path.suffix in _OPEN:
            with _OPEN[path.suffix](io.BytesIO(data)) as stream:
                data = stream.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from error
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"{path}: holds more than {MAX_TEXT_BYTES >> 30} GiB of text")
    return data
