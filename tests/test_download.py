"""Downloads against a server of this test: resumed, checked, renamed last; and what is refused."""

import gzip
import hashlib
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalefold.cli import app
from scalefold.config import load_config
from scalefold.data.raw.download import (
    PARTS,
    RemoteFile,
    download,
    fetch,
    files_of,
    index_url,
    list_bucket,
    read_ids,
    read_manifest,
    run_downloads,
)
from scalefold.errors import DataError


class Server(ThreadingHTTPServer):
    """Serves ``files``; remembers the Range headers; may break off after ``cut`` bytes or ignore ranges."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.cut: int | None = None
        self.knows_ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(urllib.parse.unquote(self.path))
        if content is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.knows_ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.cut])
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


CONTENT = bytes(range(256)) * 64
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_gets_its_name_only_when_it_is_whole(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT
    target, file = tmp_path / "deep" / "a", RemoteFile(f"{server.url}/a", "a", len(CONTENT), SHA256)
    assert fetch(file, target) == len(CONTENT)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_an_interrupted_transfer_continues_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.cut = CONTENT, 5000
    target, file = tmp_path / "a", RemoteFile(f"{server.url}/a", "a", len(CONTENT), SHA256)
    with pytest.raises(DataError, match="run the same command again to continue"):
        fetch(file, target)
    assert not target.exists()
    assert (tmp_path / "a.partial").stat().st_size == 5000
    server.cut = None
    assert fetch(file, target) == len(CONTENT) - 5000
    assert server.ranges == [None, "bytes=5000-"]
    assert target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over_and_does_not_append(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.knows_ranges = CONTENT, False
    (tmp_path / "a.partial").write_bytes(b"x" * 100)
    assert fetch(RemoteFile(f"{server.url}/a", "a", sha256=SHA256), tmp_path / "a") == len(CONTENT)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [b"", b"longer than there"])
def test_a_part_that_is_complete_or_too_long_is_noticed(server: Server, tmp_path: Path, extra: bytes) -> None:
    server.files["/a"] = CONTENT
    (tmp_path / "a.partial").write_bytes(CONTENT + extra)
    fetch(RemoteFile(f"{server.url}/a", "a"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("size", "digest", "message"),
    [
        (17, None, f"{len(CONTENT)} bytes came, 17 are listed"),
        (None, "0" * 64, f"SHA-256 {SHA256} is not the listed 0"),
    ],
)
def test_a_file_that_differs_from_its_listing_is_removed(
    server: Server, tmp_path: Path, size: int | None, digest: str | None, message: str
) -> None:
    server.files["/a"] = CONTENT
    with pytest.raises(DataError, match=message):
        fetch(RemoteFile(f"{server.url}/a", "a", size, digest), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_gzip_file_that_is_cut_is_removed(server: Server, tmp_path: Path) -> None:
    server.files["/1abc.cif.gz"] = gzip.compress(CONTENT)[:-4]
    with pytest.raises(DataError, match="no complete gzip file"):
        fetch(RemoteFile(f"{server.url}/1abc.cif.gz", "1abc.cif.gz"), tmp_path / "1abc.cif.gz")
    assert list(tmp_path.iterdir()) == []


def test_one_failure_is_reported_and_does_not_stop_the_others(server: Server, tmp_path: Path) -> None:
    server.files |= {"/a": CONTENT, "/c": b"c"}
    lines: list[str] = []
    result = download([RemoteFile(f"{server.url}/{n}", n) for n in "abc"], tmp_path, 2, lines.append)
    assert (result.num_files, result.num_bytes, result.num_present) == (2, len(CONTENT) + 1, 0)
    assert len(result.failures) == 1
    assert "404" in result.failures[0]
    again = download([RemoteFile(f"{server.url}/{n}", n) for n in "ac"], tmp_path, 2, lines.append)
    assert (again.num_files, again.num_present) == (0, 2)


def test_pdb_entries_come_from_the_index_into_divided_folders(server: Server, tmp_path: Path) -> None:
    base = f"{server.url}/pub/pdb/data/structures/divided/mmCIF"
    server.files["/pub/pdb/derived_data/index/entries.idx"] = b"IDCODE, HEADER\n------\n1ABC\tX\n101M, y\n"
    server.files["/pub/pdb/data/structures/divided/mmCIF/ab/1abc.cif.gz"] = gzip.compress(b"data_1ABC")
    server.files["/pub/pdb/data/structures/divided/mmCIF/01/101m.cif.gz"] = gzip.compress(b"data_101M")
    files = files_of(PARTS["mmcif"], base)
    assert [file.path for file in files] == ["pdb_mmcif/raw/01/101m.cif.gz", "pdb_mmcif/raw/ab/1abc.cif.gz"]
    assert run_downloads(tmp_path, ["mmcif"], base, None, False, 2, lambda text: None)
    assert gzip.decompress((tmp_path / "pdb_mmcif/raw/ab/1abc.cif.gz").read_bytes()) == b"data_1ABC"


def test_the_index_lies_beside_the_divided_tree() -> None:
    source = PARTS["mmcif"].source
    assert source is not None
    assert index_url(source) == "https://files.wwpdb.org/pub/pdb/derived_data/index/entries.idx"


def test_a_bucket_is_listed_page_by_page(server: Server) -> None:
    head = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    item = "<Contents><Key>{}</Key><Size>{}</Size></Contents>"
    first = f"{head}{item.format('pdb/1abc_A/a3m/x.a3m', 3)}<NextContinuationToken>t=1</NextContinuationToken>"
    second = f"{head}{item.format('pdb/1abc_A/', 0)}{item.format('pdb/1abc_B/hhr/y.hhr', 5)}"
    server.files["/?list-type=2&prefix=pdb/"] = f"{first}</ListBucketResult>".encode()
    server.files["/?list-type=2&prefix=pdb/&continuation-token=t=1"] = f"{second}</ListBucketResult>".encode()
    found = list_bucket(f"{server.url}/pdb", "ops/pdb")
    assert [(file.path, file.num_bytes) for file in found] == [
        ("ops/pdb/1abc_A/a3m/x.a3m", 3),
        ("ops/pdb/1abc_B/hhr/y.hhr", 5),
    ]
    assert found[0].url == f"{server.url}/pdb/1abc_A/a3m/x.a3m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na\n", "needs a column `path`"),
        ("path\n../a\n", "m:2: path `../a` must lie below"),
        ("path,bytes\na,many\n", "m:2: bytes `many` is no whole number"),
        ("path,bytes\na,²\n", "m:2: bytes `²` is no whole number"),
        ("path,sha256\na,\nb,12\n", "m:3: sha256 `12` must be 64"),
        ("bytes,path\n1\n", "m:2: path `` must lie below"),
        ("path\na\0b\n", r"m:2: path `a\\x00b` must lie below"),
    ],
)
def test_a_broken_manifest_names_its_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_manifest(text, "http://x", "f", "m")


def test_a_manifest_gives_sizes_sums_and_escaped_addresses() -> None:
    (file,) = read_manifest(f"path,bytes,sha256\nd/a b.db,12,{'a' * 64}\n", "http://x", "official", "m")
    assert file == RemoteFile("http://x/d/a%20b.db", "official/d/a b.db", 12, "a" * 64)


def test_a_list_without_ids_is_refused() -> None:
    with pytest.raises(DataError, match="holds no PDB id"):
        read_ids("nothing here\n", "ids.txt")


def test_the_checkpoint_is_held_against_the_sum_of_the_rules(server: Server, tmp_path: Path) -> None:
    server.files["/c.pt"] = CONTENT
    lines: list[str] = []
    assert not run_downloads(tmp_path, ["checkpoint"], f"{server.url}/c.pt", None, False, 1, lines.append)
    assert any("is not the listed b518be4677048f2c" in line for line in lines)


def test_the_checkpoint_lands_where_the_system_files_look_for_it(repository: Path) -> None:
    (file,) = files_of(PARTS["checkpoint"], "https://example.com/c.pt")
    config = load_config(repository / "configs" / "h100_1x1.yaml").config
    assert Path("data") / file.path == config.training.init_checkpoint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "pdb"], "--only pdb: must be one of mmcif, obsolete"),
        (["--only", "checkpoint"], "checkpoint: give its address with --source; NERSC portal"),
        (["--only", "checkpoint", "--source", "folder/c.pt"], "checkpoint: --source folder/c.pt: must be an address"),
        (["--source", "http://x"], "--source and --list describe one part"),
        (["--workers", "0"], "--workers 0: at least one transfer"),
    ],
)
def test_what_cannot_be_fetched_says_why(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["download", "--out", str(tmp_path), *arguments])
    assert isinstance(done.exception, DataError)
    assert message in str(done.exception)


def test_a_dry_run_names_every_part_and_fetches_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["download", "--out", str(tmp_path), "--dry-run"])
    assert done.exit_code == 0
    assert all(name in done.output for name in PARTS)
    assert list(tmp_path.iterdir()) == []
