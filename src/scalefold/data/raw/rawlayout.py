"""Where the raw files lie: the public folder layouts, listed and cut into units of work of similar size.

Structures: ``<mmcif_dir>/<2nd and 3rd letter>/<id>.cif[.gz]`` or all in one folder. Alignments, as OpenProteinSet
delivers them: ``<root>/pdb/<chain id>/[<kind>/]<file>[.gz]`` with ``<root>/duplicate_pdb_chains.txt``; a root without
a ``pdb`` folder holds the chain folders itself. In the place of either the official preprocessed set (``official.py``).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scalefold.data.raw import official
from scalefold.data.raw.rawfile import COMPRESSIONS, read_bytes
from scalefold.data.raw.rejection import Rejection
from scalefold.errors import DataError
from scalefold.textfile import decode

# Units depend on the raw data alone, never on the number of workers, so any run gives the same shards.
_MIN_UNIT_BYTES = 16 << 20
_MAX_STRUCTURE_UNITS = 256
_MAX_ALIGNMENT_UNITS = 512
_UNREAD_STRUCTURES = (".bcif", ".bcif.gz", ".cif.zst", ".cif.bz2", ".cif.xz", ".cif.Z")
_GZIP_RATIO = 4  # text bytes per compressed byte, measured on structures and alignments


@dataclass(frozen=True)
class RawLayout:
    """The raw data of a store."""

    mmcif_dir: Path
    alignment_dirs: tuple[Path, ...] = ()  # a chain found in several is taken from the first
    clusters_file: Path | None = None  # one cluster of PDBID_entity names per line
    obsolete_file: Path | None = None
    evaluation_file: Path | None = None  # CAMEO-style target table (csv) or one chain id per line


@dataclass(frozen=True)
class RawFile:
    """A structure file or an alignment folder with its size as text."""

    path: str
    text_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """All units of work of a layout, in order."""

    structures: list[list[RawFile]]
    alignments: list[list[RawFile]]
    members: dict[str, list[str]]  # alignment folder -> chain ids that use it
    found: list[Rejection]  # what is left out or unusual by its name or kind alone
    fingerprint: str  # of all inputs
    work_fingerprint: str  # of all inputs but those of the last stage, clusters and evaluation list

    @property
    def disk_bytes(self) -> int:
        """Size of the raw files as they lie on disk."""
        return sum(file.disk_bytes for units in (self.structures, self.alignments) for unit in units for file in unit)


def scan(layout: RawLayout) -> Plan:
    """List all raw files. Raises DataError naming a folder or file that is missing."""
    for file in (layout.clusters_file, layout.obsolete_file, layout.evaluation_file):
        if file and not file.is_file():
            raise DataError(f"{file}: file is missing")
    structures, found = _structure_files(layout.mmcif_dir)
    alignments: list[RawFile] = []
    members: dict[str, list[str]] = {}
    taken: set[str] = set()
    for root in layout.alignment_dirs:
        folders, members_here, found_here = _alignment_folders(root)
        alignments += folders
        found += found_here
        for folder, chains in members_here.items():
            members[folder] = [chain for chain in chains if chain not in taken]
        taken.update(chain for chains in members_here.values() for chain in chains)
    listings = (structures, alignments, members)
    return Plan(
        structures=_cut(structures, _MAX_STRUCTURE_UNITS),
        alignments=_cut(alignments, _MAX_ALIGNMENT_UNITS),
        members=members,
        found=found,
        fingerprint=_fingerprint((layout.clusters_file, layout.obsolete_file, layout.evaluation_file), *listings),
        work_fingerprint=_fingerprint((layout.obsolete_file,), *listings),
    )


def _structure_files(folder: Path) -> tuple[list[RawFile], list[Rejection]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: folder of mmCIF files is missing")
    if official.holds_structures(folder):
        sizes = [(path, path.stat().st_size) for path in official.structure_files(folder)]
        dangling = [_dangling("entry", path) for path in sorted((folder / "dicts").glob("*")) if _is_dangling(path)]
        return [RawFile(str(path), size * _GZIP_RATIO, size) for path, size in sizes], dangling
    files, rejected = [], []
    for inside in (folder, *(Path(e.path) for e in sorted(os.scandir(folder), key=lambda e: e.name) if e.is_dir())):
        with os.scandir(inside) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.endswith((".cif", ".cif.gz")) and entry.is_file():
                    files.append(_raw_file(entry))
                elif entry.is_symlink() and _is_dangling(Path(entry.path)):
                    rejected.append(_dangling("entry", Path(entry.path)))
                elif entry.name.endswith(_UNREAD_STRUCTURES):
                    reason = "structures are read as .cif or .cif.gz only"
                    rejected.append(Rejection("entry", entry.name.split(".")[0].lower(), entry.name, reason))
    if not files:
        raise DataError(f"{folder}: no *.cif or *.cif.gz files in it or in its subfolders")
    return sorted(files, key=lambda file: (Path(file.path).name[1:3], Path(file.path).name)), rejected


def _is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _dangling(kind: str, path: Path, name: str = "") -> Rejection:
    name = name or (path.name.split(".")[0].lower() if kind == "entry" else path.name)
    return Rejection(kind, name, path.name, f"dangling link: {os.readlink(path)} is not there")


def _raw_file(entry: os.DirEntry) -> RawFile:
    size = entry.stat().st_size
    return RawFile(entry.path, size * (_GZIP_RATIO if entry.name.endswith(".gz") else 1), size)


def _alignment_folders(root: Path) -> tuple[list[RawFile], dict[str, list[str]], list[Rejection]]:
    if official.holds_alignments(root):
        shared = dict(sorted(official.alignment_folders(root).items()))
        files = [RawFile(path, inside.num_bytes, inside.num_bytes) for path, (inside, _) in shared.items()]
        return files, {path: chains for path, (_, chains) in shared.items()}, []
    folder = root / "pdb" if (root / "pdb").is_dir() else root
    if not folder.is_dir():
        raise DataError(f"{root}: alignment folder is missing")
    files, rejected = [], []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        broken = [_dangling("alignment", path)] if _is_dangling(path) else _dangling_files(path, entry.is_dir())
        rejected += broken[:1]
        if entry.is_dir() and not broken:
            files.append(_folder_size(path))
    if not files:
        raise DataError(f"{folder}: no alignment folders (<pdb id>_<chain>) in it")
    members, notes = _members([file.path for file in files], root / "duplicate_pdb_chains.txt")
    return files, members, rejected + notes


def _dangling_files(folder: Path, is_folder: bool) -> list[Rejection]:
    """Alignment files of a folder that lead nowhere: without them its alignment would silently be another one."""
    links = [Path(parent) / name for parent, dirs, names in os.walk(folder) for name in sorted(dirs + names)]
    return [_dangling("alignment", path, folder.name) for path in links if is_folder and _is_dangling(path)]


def _folder_size(folder: Path) -> RawFile:
    text_bytes = disk_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            packed = name.endswith(COMPRESSIONS)
            if name.removesuffix(Path(name).suffix if packed else "").endswith((".a3m", ".sto", ".hhr")):
                size = (Path(parent) / name).stat().st_size
                text_bytes, disk_bytes = text_bytes + size * (_GZIP_RATIO if packed else 1), disk_bytes + size
    return RawFile(str(folder), text_bytes, disk_bytes)


def _members(folders: Sequence[str], duplicates_file: Path) -> tuple[dict[str, list[str]], list[Rejection]]:
    """Chains that use each folder, from the clusters of identical chains; a folder always serves its own name."""
    clusters = []
    if duplicates_file.is_file():
        text = decode(read_bytes(duplicates_file), duplicates_file, DataError)
        clusters = [line.split() for line in text.splitlines() if line.strip()]
    cluster_of = {chain: i for i, cluster in enumerate(clusters) for chain in cluster}
    members: dict[str, list[str]] = {}
    notes: list[Rejection] = []
    used: dict[int, str] = {}
    for folder in folders:
        name = Path(folder).name
        cluster = cluster_of.get(name)
        if cluster is None:
            members[folder] = [name]
            if clusters:
                reason = f"not named in {duplicates_file}; it serves chain {name} only"
                notes.append(Rejection("note", name, name, reason))
        elif cluster in used:
            members[folder] = []
            reason = f"its cluster of identical chains already uses {used[cluster]}; folder left out"
            notes.append(Rejection("note", name, name, reason))
        else:
            used[cluster] = folder
            members[folder] = clusters[cluster]
    return members, notes


def _cut(files: list[RawFile], max_units: int) -> list[list[RawFile]]:
    limit = max(_MIN_UNIT_BYTES, sum(file.text_bytes for file in files) // max_units)
    units: list[list[RawFile]] = []
    size = limit
    for file in files:
        if size >= limit:
            units.append([])
            size = 0
        units[-1].append(file)
        size += file.text_bytes
    return units


def _fingerprint(lists: Sequence[Path | None], *listings: object) -> str:
    """Changes when a file is added, removed, renamed or changes size; independent of where the raw folders lie.

    Of the ``lists`` the content counts.
    """
    digest = hashlib.sha256()
    structures, alignments, members = listings
    for files in (structures, alignments):
        for file in files:  # type: ignore[attr-defined]
            digest.update(f"{Path(file.path).name} {file.disk_bytes}\n".encode())
    ordered = [(Path(k).name, v) for k, v in members.items()]  # type: ignore[attr-defined]
    digest.update(json.dumps(ordered).encode())
    for file in lists:
        digest.update(file.read_bytes() if file else b"-")
    return digest.hexdigest()
