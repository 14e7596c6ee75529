"""Reading raw files, plain or gzip, with errors that name the file."""

import gzip
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


def read_bytes(path: RawText) -> bytes:
    """Content of a plain or ``.gz`` file. Raises DataError naming the file if it is missing or cut off."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise DataError(f"{path}: file is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from error
