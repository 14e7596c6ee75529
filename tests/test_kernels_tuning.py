"""Launch parameters: which source wins, and that a saved sweep is found again."""

import pytest

from scalefold.errors import ConfigError
from scalefold.kernels import tuning

FIELDS = {"n": 256, "dtype": "bfloat16"}


@pytest.fixture
def kernel(monkeypatch, tmp_path, tables_read_anew):
    """A registered kernel and an empty folder of tables."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(tuning, "_defaults", {})
    tuning.register("example", lambda fields, target: {"BLOCK": target})
    return "example"


def test_the_default_follows_the_assumed_capability(kernel):
    with tuning.assume_capability(80):
        assert tuning.lookup(kernel, **FIELDS) == {"BLOCK": 80}
    with tuning.assume_capability(90):
        assert tuning.lookup(kernel, **FIELDS) == {"BLOCK": 90}


def test_a_saved_entry_beats_the_default_for_its_problem_and_target_only(kernel):
    tuning.save("sm_90", {kernel: {tuning.problem_key(FIELDS): {"BLOCK": 32}}})
    tuning.save("sm_90", {kernel: {"dtype=float16 n=256": {"BLOCK": 1}}})
    with tuning.assume_capability(90):
        assert tuning.lookup(kernel, **FIELDS) == {"BLOCK": 32}
        assert tuning.lookup(kernel, **(FIELDS | {"dtype": "float32"})) == {"BLOCK": 90}
    with tuning.assume_capability(80):
        assert tuning.lookup(kernel, **FIELDS) == {"BLOCK": 80}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"rows": 512, "n": 64}, 64),  # as far as the other entry, and earlier in the table
        ({"rows": 256, "n": 32}, 32),
        ({"rows": 4096, "n": 128}, 64),  # two and one factors of two
        ({"rows": 8192, "n": 128}, 90),  # too far
        ({"rows": 1024, "n": 8}, 90),  # narrow problems take other paths
        ({"rows": 1024, "n": 64, "c": 32}, 90),  # another kind of problem
    ],
)
def test_a_problem_without_entry_takes_that_of_the_nearest_sizes(kernel, fields, expected):
    entries = {"rows=1024 n=64": {"BLOCK": 64}, "rows=256 n=64": {"BLOCK": 32}, "rows=1024 n=4": {"BLOCK": 4}}
    tuning.save("sm_90", {kernel: entries})
    with tuning.assume_capability(90):
        assert tuning.lookup(kernel, **fields) == {"BLOCK": expected}


def test_an_override_beats_everything_and_ends_with_its_block(kernel):
    with tuning.assume_capability(90):
        with tuning.override(kernel, {"BLOCK": 8}, **FIELDS):
            assert tuning.lookup(kernel, **FIELDS) == {"BLOCK": 8}
            assert tuning.lookup(kernel, n=1) == {"BLOCK": 90}
            with tuning.override(kernel, {"BLOCK": 4}):
                assert tuning.lookup(kernel, n=1) == {"BLOCK": 4}
        assert tuning.lookup(kernel, **FIELDS) == {"BLOCK": 90}


def test_unknown_and_doubly_registered_kernels_are_refused(kernel):
    with pytest.raises(KeyError, match="registered: example"), tuning.override("missing", {}):
        pass
    with pytest.raises(ValueError, match="twice"):
        tuning.register(kernel, lambda fields, target: {})


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no table of launch parameters"),
        ("[]", "found list, a JSON object was expected"),
        ('{"example": 3}', "example: found int"),
        ('{"example": {"n=4": 3}}', "example: n=4: found int"),
        ('{"example": {"n=4": {"BLOCK": "32"}}}', "`n=4` is no problem with launch parameters"),
        ('{"example": {"n=x": {"BLOCK": 32}}}', "`n=x` is no problem"),
        ('{"example": {"n": {"BLOCK": 32}}}', "`n` is no problem"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", r":1: byte 0 \(0xff\) is not UTF-8"),
    ],
)
def test_a_table_that_is_none_is_named(kernel, tmp_path, text, message):
    file = tmp_path / "sm_90.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with tuning.assume_capability(90), pytest.raises(ConfigError, match=rf"sm_90\.json.*{message}"):
        tuning.lookup(kernel, **FIELDS)


def test_the_shipped_tables_are_read(repository):
    for file in (repository / "src/scalefold/kernels/tuned").glob("*.json"):
        assert tuning.read_table(file)
