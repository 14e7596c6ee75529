"""The comparison of a store's bytes with HDF5's own data sets: both hold the same arrays, and a difference is seen."""

from pathlib import Path
from types import ModuleType

import h5py
import pytest

from scalefold.data.store.store import Store


@pytest.fixture
def layout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    return __import__("store_layout")


def test_both_layouts_of_a_store_are_measured(layout: ModuleType, tiny_store: Path, tmp_path: Path) -> None:
    rows = layout.measure(tiny_store, "generated", tmp_path, repeats=1)
    assert [row["layout"] for row in rows] == ["bytes", "native"]
    assert all(row[name] > 0 for row in rows for name in ("mb", "open_ms", "read_mean_ms", "read_p99_ms"))
    assert rows[0]["chains"] == len(Store(tiny_store))


def test_a_chain_that_differs_is_named(
    layout: ModuleType, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = layout.write_native

    def write_wrong(store: Store, folder: Path) -> None:
        write(store, folder)
        with h5py.File(folder / "structures_00000.h5", "a") as file:
            file[store.name(3)]["coordinates"][0] = 7.0

    monkeypatch.setattr(layout, "write_native", write_wrong)
    name = Store(tiny_store).name(3)
    with pytest.raises(ValueError, match=f"{name}: the layouts hold different arrays"):
        layout.measure(tiny_store, "generated", tmp_path, repeats=1)
