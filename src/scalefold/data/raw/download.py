"""Fetching what the benchmark needs: PDB structures, alignments, the official preprocessed set, the initial checkpoint.

Everything is a list of files with address, place, and where known size and SHA-256. A file arrives under a temporary
name, continues where an interrupted transfer stopped, is checked, and only then gets its name; a file that has its name
is never fetched again. So the same command continues after any interruption.
"""

import concurrent.futures
import csv
import gzip
import hashlib
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from scalefold.errors import DataError
from scalefold.textfile import read_text

CHUNK_BYTES = 1 << 20
PARTIAL = ".partial"
#: SHA-256 of the resumable checkpoint, as the compliance rules state it.
CHECKPOINT_SHA256 = "b518be4677048f2c0f94889c91e2da73655a73b825a8aa7f8b6f5e580d8ffbed"
CHECKPOINT_NAME = "mlperf_hpc_openfold_resumable_checkpoint.pt"


@dataclass(frozen=True)
class Part:
    """One thing that can be fetched on its own.

    ``source``: default address, None if the user must name one. ``layout``: how files are found below it: ``tree``
    (PDB's divided folders, listed by its index of entries), ``s3`` (a public bucket that lists itself), ``list`` (a
    manifest: path, bytes, SHA-256), ``file``.
    """

    name: str
    what: str
    source: str | None
    layout: str
    folder: str
    gib: float | None
    where: str


#: Sizes are those of the reference's description of the data (raw mmCIF "over 55 GiB", alignments 606 GiB, the
#: preprocessed set 15 + 601 GiB); the PDB has grown since.
PARTS = {
    part.name: part
    for part in (
        Part(
            "mmcif",
            "PDB structures, divided mmCIF tree",
            "https://files.wwpdb.org/pub/pdb/data/structures/divided/mmCIF",
            "tree",
            "pdb_mmcif/raw",
            55.0,
            "or: rsync -rlpt -v -z --delete --port=33444 rsync.rcsb.org::ftp_data/structures/divided/mmCIF/ DIR",
        ),
        Part(
            "obsolete",
            "list of replaced PDB entries",
            "https://files.wwpdb.org/pub/pdb/data/status/obsolete.dat",
            "file",
            "pdb_mmcif",
            0.001,
            "",
        ),
        Part(
            "clusters",
            "40 % sequence clusters of PDB entities, which `prepare --clusters` needs",
            "https://cdn.rcsb.org/resources/sequence/clusters/clusters-by-entity-40.txt",
            "file",
            "pdb_mmcif",
            None,
            "RCSB's present clustering",
        ),
        Part(
            "openproteinset",
            "alignments of the PDB chains",
            "https://openfold.s3.amazonaws.com/pdb",
            "s3",
            "open_protein_set/pdb",
            606.0,
            "or: aws s3 sync --no-sign-request s3://openfold/pdb DIR",
        ),
        Part(
            "preprocessed",
            "the official preprocessed set: chain table, structure pickles, alignment shards",
            None,
            "list",
            "official",
            616.0,
            "NERSC portal, folder cfs/m4291/openfold (HTTPS or Globus)",
        ),
        Part(
            "checkpoint",
            "the initial checkpoint of the benchmark",
            None,
            "file",
            ".",  # where the system files look for it
            None,
            f"NERSC portal, folder cfs/m4291/openfold: {CHECKPOINT_NAME}",
        ),
    )
}


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: address, place below the output folder, and what is known of it."""

    url: str
    path: str
    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Report:
    """What a download did."""

    num_files: int
    num_bytes: int
    num_present: int
    failures: tuple[str, ...]


def files_of(part: Part, source: str | None = None, listing: Path | None = None) -> list[RemoteFile]:
    """The files of a part below ``source``.

    Args:
        source: address that replaces the part's own; of the folder (``tree``, ``list``) or of the file.
        listing: a file that names what to fetch: for ``tree`` PDB ids, one per line (default: the archive's index of
            entries); for ``s3`` and ``list`` a manifest, CSV with ``path`` and optional ``bytes`` and ``sha256``
            (default: ``manifest.csv`` below the source; for ``s3`` what the bucket lists).

    Raises:
        DataError: no address is known, it is none, or the listing cannot be read.
    """
    base = (source or part.source or "").rstrip("/")
    if not base:
        raise DataError(f"{part.name}: give its address with --source; {part.where}")
    if not re.fullmatch(r"(https?|ftp|file)://\S+", base):
        raise DataError(f"{part.name}: --source {base}: must be an address, for example https://host/folder/file")
    if part.layout == "file":
        digest = CHECKPOINT_SHA256 if part.name == "checkpoint" else None
        name = CHECKPOINT_NAME if part.name == "checkpoint" else base.rsplit("/", 1)[-1]
        return [RemoteFile(base, str(Path(part.folder) / name), sha256=digest)]
    if part.layout == "tree":
        text = read_text(listing, DataError) if listing else fetch_text(index_url(base))
        return [_entry(base, part.folder, pdb_id) for pdb_id in read_ids(text, listing or index_url(base))]
    if part.layout == "s3" and listing is None:
        return list_bucket(base, part.folder)
    text = read_text(listing, DataError) if listing else fetch_text(f"{base}/manifest.csv")
    return read_manifest(text, base, part.folder, str(listing or f"{base}/manifest.csv"))


def index_url(base: str) -> str:
    """PDB's own index of all current entries, beside the divided tree (``…/pdb/derived_data/index/entries.idx``)."""
    root = base.split("/data/structures/")[0]
    return f"{root}/derived_data/index/entries.idx"


def list_bucket(base: str, folder: str) -> list[RemoteFile]:
    """All objects of an S3 bucket below ``https://BUCKET/PREFIX``, with their sizes (ListObjectsV2, page by page).

    Raises:
        DataError: the bucket does not list itself.
    """
    address = urllib.parse.urlsplit(base)
    root, prefix = f"{address.scheme}://{address.netloc}", address.path.strip("/") + "/"
    found, token = [], None
    while True:
        query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
        url = f"{root}/?{urllib.parse.urlencode(query)}"
        try:
            page = ElementTree.fromstring(fetch_text(url))
        except ElementTree.ParseError as error:
            raise DataError(f"{url}: is no listing of a bucket: {error}") from None
        found += _bucket_files(page, root, prefix, folder, url)
        token = page.findtext("{*}NextContinuationToken")
        if not token:
            return found


def _bucket_files(page: ElementTree.Element, root: str, prefix: str, folder: str, url: str) -> Iterator[RemoteFile]:
    for item in page.findall("{*}Contents"):
        key, size = item.findtext("{*}Key", ""), item.findtext("{*}Size", "")
        path = key.removeprefix(prefix)
        if not re.fullmatch(r"[0-9]{1,18}", size):
            raise DataError(f"{url}: the size {size[:20]!r} of {key[:80]!r} is no whole number")
        if path and not path.endswith("/") and ".." not in Path(path).parts:
            yield RemoteFile(f"{root}/{urllib.parse.quote(key)}", f"{folder}/{path}", int(size))


def read_ids(text: str, name: Path | str) -> list[str]:
    """Four-character PDB ids, lower case, sorted: the first word of each line that has that form."""
    ids = {m[1].lower() for line in text.splitlines() if (m := re.match(r"\s*([0-9][A-Za-z0-9]{3})\b", line))}
    if not ids:
        raise DataError(f"{name}: holds no PDB id (four characters, a digit first) at the start of any line")
    return sorted(ids)


def _entry(base: str, folder: str, pdb_id: str) -> RemoteFile:
    name = f"{pdb_id[1:3]}/{pdb_id}.cif.gz"
    return RemoteFile(f"{base}/{name}", f"{folder}/{name}")


def read_manifest(text: str, base: str, folder: str, name: str) -> list[RemoteFile]:
    """Files of a CSV with the columns ``path`` and, where known, ``bytes`` and ``sha256``.

    Raises:
        DataError: a column or value is wrong, or a path leads out of the folder; names the line.
    """
    rows = csv.DictReader(text.splitlines())
    try:
        if "path" not in (rows.fieldnames or ()):
            raise DataError(f"{name}: needs a column `path`, and may have `bytes` and `sha256`")
        return [_listed_file(row, base, folder, f"{name}:{line}") for line, row in enumerate(rows, 2)]
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: cannot be read: {error}") from None


def _listed_file(row: dict[str, str | None], base: str, folder: str, place: str) -> RemoteFile:
    path, size, digest = ((row.get(column) or "").strip() for column in ("path", "bytes", "sha256"))
    if not path.isprintable() or not path or path.startswith("/") or ".." in Path(path).parts:
        raise DataError(f"{place}: path `{path[:80]}` must lie below the folder")
    if not re.fullmatch(r"[0-9]{0,18}", size):
        raise DataError(f"{place}: bytes `{size[:20]}` is no whole number")
    if digest and not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataError(f"{place}: sha256 `{digest[:80]}` must be 64 hexadecimal digits")
    url = f"{base}/{urllib.parse.quote(path)}"
    return RemoteFile(url, f"{folder}/{path}", int(size) if size else None, digest or None)


def describe(files: Sequence[RemoteFile], out: Path, part: Part) -> str:
    """One line for ``--dry-run``: how many files, how large, how many are there already."""
    present = sum((out / file.path).exists() for file in files)
    known = [file.num_bytes for file in files if file.num_bytes is not None]
    size = f"{sum(known) / 2**30:.3f} GiB" if files and len(known) == len(files) else "size not listed"
    about = f", about {part.gib:g} GiB in all" if part.gib and len(known) < len(files) else ""
    return f"{part.name:15s} {len(files)} files, {size}{about}, {present} present -> {out / part.folder}"


def download(
    files: Sequence[RemoteFile],
    out: Path,
    workers: int = 8,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> Report:
    """Fetch all files below ``out``; a file that fails is reported and does not stop the others."""
    present = [file for file in files if (out / file.path).exists()]
    missing = [file for file in files if not (out / file.path).exists()]
    failures, num_bytes = [], 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        flights = {pool.submit(fetch, file, out / file.path): file for file in missing}
        for done, flight in enumerate(concurrent.futures.as_completed(flights), 1):
            try:
                num_bytes += flight.result()
            except DataError as error:
                failures.append(str(error))
                report(f"failed: {error}")
            if done % 1000 == 0 or done == len(missing):
                report(f"{done} of {len(missing)} files, {num_bytes / 1e9:.2f} GB")
    return Report(len(missing) - len(failures), num_bytes, len(present), tuple(failures))


def fetch(file: RemoteFile, target: Path) -> int:
    """Fetch one file to ``target``; returns the bytes transferred now.

    Raises:
        DataError: the server refuses, the transfer breaks off (what has come stays for the next try), or size or
            SHA-256 differ (the file is removed).
    """
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        transferred = _transfer(file, partial)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        code = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise DataError(f"{file.url}: {code}{reason}; run the same command again to continue") from None
    except OSError as error:
        raise DataError(f"{partial}: cannot write: {error.strerror or error}") from None
    _check(file, partial)
    partial.replace(target)
    return transferred


def _transfer(file: RemoteFile, partial: Path) -> int:
    """Append what is missing; start over if the server cannot continue."""
    have = partial.stat().st_size if partial.exists() else 0
    if file.num_bytes is not None and have == file.num_bytes:
        return 0
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is missing, or the part here is longer than the file there
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return 0
        partial.unlink()
        return _transfer(file, partial)
    with answer, partial.open("ab" if answer.status == 206 else "wb") as stream:
        wanted, count = answer.headers.get("Content-Length"), 0
        while chunk := answer.read(CHUNK_BYTES):
            count += stream.write(chunk)
    if wanted is not None and count != int(wanted):
        raise ConnectionError(f"ended after {count} of {wanted} bytes")
    return count


def _check(file: RemoteFile, partial: Path) -> None:
    size = partial.stat().st_size
    if file.num_bytes is not None and size != file.num_bytes:
        partial.unlink()
        raise DataError(f"{file.url}: {size} bytes came, {file.num_bytes} are listed; removed, run again")
    if file.sha256 is not None and (found := sha256_of(partial)) != file.sha256:
        partial.unlink()
        raise DataError(f"{file.url}: SHA-256 {found} is not the listed {file.sha256}; removed, run again")
    if file.path.endswith(".gz") and file.sha256 is None and not _is_whole_gzip(partial):
        partial.unlink()
        raise DataError(f"{file.url}: no complete gzip file; removed, run again")


def _is_whole_gzip(path: Path) -> bool:
    """Decompress to the end: gzip's own checksum covers the content."""
    try:
        with gzip.open(path) as stream:
            while stream.read(CHUNK_BYTES):
                pass
    except (OSError, EOFError, ValueError):
        return False
    return True


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_text(url: str) -> str:
    """A small text file. Raises DataError if it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be read: {getattr(error, 'reason', None) or error}") from None


def choose_parts(only: Iterable[str]) -> list[Part]:
    """The parts of these names, or all. Raises DataError for a name that no part has."""
    names = list(only) or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise DataError(f"--only {name}: must be one of {', '.join(PARTS)}")
    return [PARTS[name] for name in names]


def run_downloads(
    out: Path,
    only: Sequence[str],
    source: str | None,
    listing: Path | None,
    dry_run: bool,
    workers: int,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> bool:
    """What ``scalefold download`` does; True if everything that was asked for is there now.

    Without ``only`` it goes through all parts and names those whose address it does not know. ``source`` and
    ``listing`` need exactly one part. Raises DataError.
    """
    parts = choose_parts(only)
    if (source or listing) and len(parts) != 1:
        raise DataError("--source and --list describe one part: name it with --only")
    if workers < 1:
        raise DataError(f"--workers {workers}: at least one transfer at once")
    complete = True
    for part in parts:
        if part.source is None and source is None and (not only or dry_run):
            about = f"about {part.gib:g} GiB" if part.gib else "size not stated"
            report(f"{part.name:15s} {part.what}, {about}: needs --source; {part.where}")
            complete = complete and dry_run
            continue
        if dry_run and listing is None and part.layout in ("tree", "s3"):
            report(f"{part.name:15s} {part.what}, about {part.gib:g} GiB, from {source or part.source} ({part.where})")
            continue
        files = files_of(part, source, listing)
        report(describe(files, out, part))
        if not dry_run:
            complete = not download(files, out, workers, report).failures and complete
    return complete
