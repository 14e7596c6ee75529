"""Every reader under damaged and random input: only documented errors come out, in one line.

``python benchmarks/measure/fuzz.py`` is the long version, with limits on time and memory for each input.
"""

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from scalefold.errors import ScaleFoldError

INPUTS = 40
SLOWEST_S = 5


@pytest.fixture(scope="module")
def fuzz(repository: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The scripts of the long version: readers and damage, and its command."""
    sys.path.insert(0, str(repository / "benchmarks" / "measure"))
    yield importlib.import_module("fuzz_readers"), importlib.import_module("fuzz")
    sys.path.remove(str(repository / "benchmarks" / "measure"))


@pytest.fixture(scope="module")
def readers(fuzz: tuple[ModuleType, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    return fuzz[0].build(folder), folder


def outcome(reader, folder: Path, data: bytes) -> str:
    """What comes of one input; anything but a result or a documented error is raised."""
    start = time.process_time()
    try:
        reader.read(folder, data)
        result, message = "accepted", ""
    except ScaleFoldError as error:
        result, message = type(error).__name__, str(error)
    assert message.isprintable()
    assert time.process_time() - start < SLOWEST_S
    return result


def test_the_command_knows_every_reader(fuzz: tuple[ModuleType, ModuleType], readers: tuple[dict, Path]) -> None:
    assert list(readers[0]) == list(fuzz[1].READERS)


def test_every_sample_is_read(readers: tuple[dict, Path]) -> None:
    """Damage to files that no reader takes would show nothing."""
    found, folder = readers
    for name, reader in found.items():
        assert reader.samples, name
        assert {outcome(reader, folder, sample) for sample in reader.samples} == {"accepted"}, name


def test_damaged_samples_give_documented_errors(
    fuzz: tuple[ModuleType, ModuleType], readers: tuple[dict, Path]
) -> None:
    """The first inputs of the long run."""
    found, folder = readers
    for name, reader in found.items():
        outcomes = {
            outcome(reader, folder, fuzz[0].mutate(random.Random(f"{name} 0 {index}"), reader.samples))
            for index in range(INPUTS)
        }
        assert outcomes, name


def test_processes_that_share_a_reader_feed_it_the_same_inputs(
    fuzz: tuple[ModuleType, ModuleType], readers: tuple[dict, Path], tmp_path: Path
) -> None:
    asked = argparse.Namespace(inputs=101, seed=3, jobs=2, seconds=None, keep=tmp_path)
    alone = fuzz[1].Runner(readers[0]["clusters"], readers[1], tmp_path, tmp_path / "tally.json")
    fuzz[1].run_mutations(alone, asked.seed, 0, fuzz[1].num_mutations(asked))
    fuzz[1].run_hypothesis(alone, asked.seed, asked.inputs - fuzz[1].num_mutations(asked))
    shared = fuzz[1].fuzz_reader("clusters", asked)
    assert (shared["inputs"], shared["accepted"]) == (alone.tally.inputs, alone.tally.accepted)
    assert shared["inputs"] == 101
    assert 0 < alone.tally.accepted < 101


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_random_input_gives_documented_errors(readers: tuple[dict, Path]) -> None:
    """Bytes, text and JSON that owe nothing to a sample."""
    found, folder = readers

    @seed(0)
    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | JSON.map(json.dumps).map(str.encode))
    def feed(data: bytes) -> None:
        for reader in found.values():
            outcome(reader, folder, data)

    feed()
