"""Messages: what is wrong, then what was expected, found, where, and what to try, a line each."""

import pickle

import pytest

from recompile.errors import CaptureError, IndexOutOfRange, OptionError, RecompileError, unknown


def test_every_known_part_has_a_line():
    error = RecompileError("It broke", expected="a", got="b", where="m.py:1 in forward: x", try_="c")
    assert str(error) == "It broke\n  expected: a\n  got: b\n  where: m.py:1 in forward: x\n  try: c"


def test_unknown_parts_are_left_out():
    assert str(RecompileError("It broke", got="b")) == "It broke\n  got: b"


def test_an_unknown_name_comes_with_the_nearest_and_all_allowed():
    error = unknown("pass", "fuse-lookup", ["fuse-lookups", "dead-code"])
    assert isinstance(error, OptionError) and isinstance(error, ValueError)
    assert "unknown pass 'fuse-lookup'; did you mean 'fuse-lookups'?" in str(error)
    assert "one of dead-code, fuse-lookups" in str(error)


def test_an_unknown_name_near_to_nothing():
    assert "did you mean" not in str(unknown("pass", "xyz", ["dead-code"]))


@pytest.mark.parametrize("kind", [IndexError, RuntimeError, RecompileError])
def test_a_bad_id_is_what_eager_raises(kind):
    with pytest.raises(kind, match="got id 5"):
        raise IndexOutOfRange("table 'a' has 3 rows, got id 5")


def test_capture_errors_keep_their_parts():
    error = CaptureError("a sentence", "node_1", "m.py:2 in f: y")
    assert (error.why, error.node, error.line) == ("a sentence", "node_1", "m.py:2 in f: y")
    assert "node node_1" in str(error) and "m.py:2" in str(error)


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RecompileError("It broke", got="b")))
    assert str(error) == "It broke\n  got: b"
