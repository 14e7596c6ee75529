"""Verbs that make and check data."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    mmcif_dir: Annotated[
        Path, typer.Option(help="folder of .cif or .cif.gz files, or the official set's chains.csv and dicts")
    ],
    out: Annotated[Path, typer.Option(help="store to write")],
    alignments: Annotated[
        list[Path] | None, typer.Option(help="OpenProteinSet-style folder, or one with super.index; repeatable")
    ] = None,
    clusters: Annotated[
        Path | None, typer.Option(help="clusters-by-entity-40.txt; without it no chain of mmCIF files can train")
    ] = None,
    obsolete: Annotated[Path | None, typer.Option(help="obsolete.dat")] = None,
    evaluation_list: Annotated[Path | None, typer.Option(help="CAMEO-style csv, or chain ids")] = None,
    workers: Annotated[int, typer.Option(help="processes on this node")] = 1,
    mpi: Annotated[bool, typer.Option(help="share the work over MPI ranks (needs mpi4py)")] = False,
) -> None:
    """Read raw structures and alignments into a store. Restartable: run it again to continue.

    Example: scalefold prepare --mmcif-dir pdb/raw --alignments open_protein_set --clusters clusters-by-entity-40.txt
    --obsolete obsolete.dat --out data/store --workers 32
    """
    from scalefold.data.raw.rawlayout import RawLayout
    from scalefold.data.store.prepare import prepare as prepare_store
    from scalefold.data.store.units import mpi_team

    layout = RawLayout(mmcif_dir, tuple(alignments or ()), clusters, obsolete, evaluation_list)
    summary = prepare_store(layout, out, workers, team=mpi_team() if mpi else None)
    print(f"{summary.num_chains} chains in {summary.seconds:.1f} s; {summary.num_rejected} rejected, ", end="")
    print(f"see {out / 'rejected.csv'}")


def download(
    out: Annotated[Path, typer.Option(help="folder to fill")],
    only: Annotated[
        list[str] | None, typer.Option(help="mmcif, obsolete, clusters, openproteinset, preprocessed or checkpoint")
    ] = None,
    source: Annotated[str | None, typer.Option(help="address of the one part named with --only")] = None,
    listing: Annotated[Path | None, typer.Option("--list", help="PDB ids, or a CSV of path, bytes, sha256")] = None,
    dry_run: Annotated[bool, typer.Option(help="say what would be fetched, fetch nothing")] = False,
    workers: Annotated[int, typer.Option(help="transfers at once")] = 8,
) -> None:
    """Fetch data and checkpoint. Run it again to continue. Exit status 1 if something is missing.

    Example: scalefold download --out data --only mmcif --dry-run
    """
    from scalefold.data.raw.download import run_downloads

    complete = run_downloads(out, only or [], source, listing, dry_run, workers)
    raise typer.Exit(code=int(not complete))


def verify_data(
    store: Annotated[Path, typer.Argument(help="store folder")],
    quick: Annotated[bool, typer.Option(help="sizes only, no checksums")] = False,
) -> None:
    """Check a store against its manifest. Exit status 1 if anything differs.

    Example: scalefold verify-data data/store
    """
    from scalefold.data.store.manifest import verify_data as verify

    result = verify(store, quick)
    for problem in result.problems:
        print(problem)
    print(f"{result.num_files} files, {result.num_bytes / 1e9:.3f} GB, {result.num_chains} chains: ", end="")
    print(f"{len(result.problems)} problems" if result.problems else "as prepared")
    raise typer.Exit(code=int(bool(result.problems)))
