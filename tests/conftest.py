"""Fixtures shared by all tests."""

import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.repair()

if not importlib.util.find_spec("triton"):  # it exists for Linux only; everything else is tested elsewhere too
    collect_ignore_glob = ["test_kernels_*.py", "test_compile_*.py", "test_direct.py", "test_rings.py"]

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no reason to fail
hypothesis.settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parents[1]

# programs of this environment (scalefold, torchrun, shellcheck) are found whether or not it is activated
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels_are_looked_through() -> Iterator[None]:
    """Where a GPU runs them: one that a compiler made wrong fails the test that asks for it, whatever its numbers."""
    if not torch.cuda.is_available() or not importlib.util.find_spec("triton"):
        yield
        return
    from scalefold.kernels.compiled.ahead import counting

    with counting():
        yield


@pytest.fixture
def tables_read_anew() -> Iterator[None]:
    """Launch parameters that other tests have looked up are not known here, nor those of this test afterwards."""
    from scalefold.kernels import tuning

    for read in (tuning.table, tuning._resolved):
        read.cache_clear()
    yield
    for read in (tuning.table, tuning._resolved):
        read.cache_clear()


OWN_WORK_S = 600.0


def computed_s() -> float:
    """What this process and those it has waited for have computed."""
    own, system, of_children, system_of_children, _ = os.times()
    return own + system + of_children + system_of_children


@pytest.fixture(autouse=True)
def own_work(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test may compute for ten minutes, however long a busy machine takes over it; ``own_work(S)`` allows more."""
    mark = request.node.get_closest_marker("own_work")
    limit_s, before = mark.args[0] if mark else OWN_WORK_S, computed_s()
    yield
    assert computed_s() - before < limit_s, f"computed for more than {limit_s:.0f} s"


def find_shared() -> Path | None:
    """Folder with the reference material: ``$SCALEFOLD_SHARED`` or ``../shared`` beside the checkout."""
    candidates = [os.environ.get("SCALEFOLD_SHARED"), str(REPOSITORY.parent / "shared")]
    return next((Path(c) for c in candidates if c and (Path(c) / "golden").is_dir()), None)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference material, or a skip that says how to provide it."""
    folder = find_shared()
    if folder is None:
        pytest.skip("reference material absent: set SCALEFOLD_SHARED to a folder with golden/, data/ and spec/")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """Numbers that the MLCommons reference produced."""
    return shared_dir / "golden"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared store of 30 generated training and 4 evaluation proteins."""
    from scalefold.data.made.demo import generate
    from scalefold.data.store.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    made = generate(folder / "raw", seed=3, num_train=30, num_eval=4)
    prepare(made.layout(), folder / "store", report=lambda text: None)
    return folder / "store"


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


REAL_ENTRIES = ("1l2y", "1a00", "1nqp", "1bjp", "1out")  # 1out: the only entry that templates of the others come from


@pytest.fixture(scope="session")
def real_store(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared store of a few real entries with real alignments; two of their chains are for evaluation."""
    from scalefold.data.raw.rawlayout import RawLayout
    from scalefold.data.store.prepare import prepare

    folder, source = tmp_path_factory.mktemp("real"), shared_dir / "data"
    for entry in REAL_ENTRIES:
        middle = folder / "raw" / entry[1:3]
        middle.mkdir(parents=True, exist_ok=True)
        (middle / f"{entry}.cif.gz").symlink_to(source / "pdb_mmcif" / "raw" / entry[1:3] / f"{entry}.cif.gz")
    roots = ("open_protein_set", "open_protein_set_computed")
    alignments = tuple(link_alignments(source / name, folder / name) for name in roots)
    targets = folder / "targets.txt"
    targets.write_text("1l2y_A\n1bjp_A\n")
    entries = source / "pdb_mmcif"
    layout = RawLayout(
        folder / "raw", alignments, entries / "clusters-by-entity-40.txt", entries / "obsolete.dat", targets
    )
    prepare(layout, folder / "store", report=lambda line: None)
    return folder / "store"


def link_alignments(source: Path, target: Path) -> Path:
    """The alignment folders that serve the real entries, with the list of chains they serve."""
    (target / "pdb").mkdir(parents=True)
    used = []
    for line in (source / "duplicate_pdb_chains.txt").read_text().splitlines():
        if any(chain[:4] in REAL_ENTRIES for chain in line.split()):
            used.append(line)
            (target / "pdb" / line.split()[0]).symlink_to(source / "pdb" / line.split()[0])
    (target / "duplicate_pdb_chains.txt").write_text("\n".join(used) + "\n")
    return target


# --- modules of the benchmark of runs ---

OF_GPU_RUNS = ("gpu_runs", "gpu_layouts", "gpu_starts", "gpu_readings", "gpu_judge", "watched", "common")


@pytest.fixture
def gpu_runs(repository, monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    yield importlib.import_module("gpu_runs")
    for name in OF_GPU_RUNS:
        sys.modules.pop(name, None)


@pytest.fixture
def layouts(gpu_runs):
    """Which starts there are."""
    return importlib.import_module("gpu_layouts")


@pytest.fixture
def starts(gpu_runs):
    """How they go on."""
    return importlib.import_module("gpu_starts")


@pytest.fixture
def readings(gpu_runs):
    """What they left."""
    return importlib.import_module("gpu_readings")
