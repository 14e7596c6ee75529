"""What the doctor says of a machine."""

from scalefold.doctor import _peers, examine


def test_this_machine_is_examined_and_can_run() -> None:
    found = {finding.topic: finding for finding in examine()}
    assert {"python", "torch", "cpu", "triton cache"} <= set(found)
    assert not [finding for finding in found.values() if finding.level == "problem"]


def test_gpus_that_cannot_read_each_others_memory_are_named() -> None:
    assert _peers(1, lambda a, b: False) == []
    assert [finding.level for finding in _peers(4, lambda a, b: True)] == ["ok"]
    (note,) = _peers(3, lambda a, b: {a, b} != {0, 2})
    assert note.level == "note"
    assert note.text.startswith("cuda:0 cannot read the memory of cuda:2")
