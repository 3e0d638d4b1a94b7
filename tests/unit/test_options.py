"""Options: typed, with the nearest name in every complaint; the documentation's table is made from them."""

from pathlib import Path

import pytest

from recompile.errors import OptionError
from recompile.options import Options, options_table


def test_nothing_given_is_the_default():
    assert Options.from_dict(None) == Options.from_dict({}) == Options()


def test_equal_options_have_equal_text():
    one = Options.from_dict({"strict": True, "inductor": {"max_autotune": True, "cpp.threads": 1}})
    two = Options.from_dict({"inductor": {"cpp.threads": 1, "max-autotune": True}, "strict": True})
    assert one == two and repr(one) == repr(two)
    assert eval(repr(one), {"Options": Options}) == one


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"strickt": True}, "unknown option 'strickt'; did you mean 'strict'?"),
        ({"strict": 1}, "option 'strict' has the wrong type\n  expected: bool\n  got: 1 (int)"),
        ({"verify": "shape"}, "did you mean 'shapes'?\n  expected: one of none, numerics, shapes"),
        ({"numerics": "bitwise"}, "one of exact, fast, reassociate"),
        ({"inductor": True}, "option 'inductor' has the wrong type\n  expected: a dictionary"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'?"),
    ],
)
def test_bad_options_are_named(given, sentence):
    with pytest.raises(OptionError) as caught:
        Options.from_dict(given)
    assert sentence in str(caught.value)


def test_the_environment_sets_the_default_passes(monkeypatch):
    monkeypatch.setenv("RECOMPILE_PASSES", "default,-dead-code")
    assert Options.from_dict(None).passes == "default,-dead-code"
    assert Options.from_dict({"passes": "dead-code"}).passes == "dead-code"


def test_the_documentation_has_the_table():
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert options_table() in page.read_text()
