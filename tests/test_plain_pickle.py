"""Pickles as data: everything plain is read, nothing is ever called, and no file takes for ever."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefold.data.raw import official
from scalefold.data.raw.plain_pickle import loads
from scalefold.errors import DataError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**63), 2**63 - 1), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_comes_back_as_pythons_own_reader_gives_it(value: object, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("kind", ["float64", "float32", "int64", "uint8", "bool", ">f8"])
def test_scalars_of_numpy_become_numbers(kind: str) -> None:
    scalar = np.ones(1, dtype=kind)[0]
    assert loads(pickle.dumps({"resolution": scalar})) == {"resolution": 1}
    assert type(loads(pickle.dumps(scalar))) in (bool, int, float)


POINTER = (  # a scalar of a type that was declared to hold a Python object, at an address the file chooses
    b"\x80\x02cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR(K\x03X\x01\x00\x00\x00|NNNK\x08K\x08"
    b"K\x00tbC\x08AAAAAAAAtR."
)
REFUSED = {
    "pointer": (POINTER, "a NumPy type 'O8' that is no plain number"),
    "array": (pickle.dumps(np.zeros(2)), "wants to load numpy"),
    "object": (pickle.dumps(Path("x")), "wants to load pathlib"),
    "record": (pickle.dumps(np.zeros(1, "i4,i4")[0]), "that is no plain number"),
    "state": (pickle.dumps(np.float64(1)).replace(b"\x8c\x01<", b"\x8c\x01="), "no plain number"),
    "size": (pickle.dumps(np.float64(1)).replace(b"C\x08", b"C\x07", 1), "no readable pickle"),
    "name": (b"\x80\x04cnumpy\ndtype\n.", "a name or a type in the place of data"),
    "number": (pickle.dumps(1 << 70), "more than 64 bits"),
    "surrogate": (b"\x80\x04\x8c\x03\xed\xa0\x80.", "no readable pickle"),
    "tuple key": (pickle.dumps({(1, 2): 3}), "neither text nor a whole number"),
    "old text": (b"S'x'\n.", "uses STRING"),
    "instance": (b"(i__builtin__\nlist\n.", "uses INST"),
    "persistent": (b"\x80\x04K\x01Q.", "uses BINPERSID"),
    "cut": (pickle.dumps({"a": [1, 2]})[:-2], "no readable pickle"),
    "empty": (b"", "no readable pickle"),
    "noise": (b"hello world", "no readable pickle"),
    "set on a list": (b"\x80\x04]K\x01K\x02s.", "do not belong to a dictionary"),
    "mark left": (b"\x80\x04(K\x01.", "no readable pickle"),
    "itself": (b"\x80\x04]\x94h\x00a.", "contains itself"),
    "deep": (b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".", "more than 16 levels deep"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_data_is_refused_in_one_line(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        loads(data)
    assert "\n" not in str(caught.value)


def test_shared_tuples_take_no_time(tmp_path: Path) -> None:
    """Each tuple holds the one before twice: 2^40 parts if they were written out."""
    few, many = (b"\x80\x04)\x94" + b"".join(b"h%c\x86\x94" % n for n in range(count)) + b"." for count in (12, 40))
    start = time.process_time()
    assert loads(few) == pickle.loads(few)
    file = tmp_path / "ab.pkl"
    file.write_bytes(many)
    with pytest.raises(DataError, match=r"ab\.pkl: "):
        official.read_entries(file)
    wide = b"\x80\x04](" + b"K\x01" * 1000 + b"e\x94(" + b"h\x00" * 100_000 + b"t\x86."
    with pytest.raises(DataError, match="repeats its parts so often"):
        loads(wide)
    assert time.process_time() - start < 5
