"""Passes of installed packages: which are known, and what is said of those that cannot be used."""

import sys
import warnings

import pytest

from recompile.pipeline import parse_passes
from recompile.rewrite import registered, registry

SHIPPED = """
from dataclasses import dataclass
from recompile import Pass, register

@dataclass(frozen=True)
class Shipped(Pass):
    "A class that an entry point names."

@register
@dataclass(frozen=True)
class Registered(Pass):
    "A class that its module registers."

@dataclass(frozen=True)
class DeadCode(Pass):
    "Its name is taken."

@dataclass(frozen=True)
class Demanding(Pass):
    needed: int
"""
USABLE = ("shipped_passes:Shipped", "shipped_passes")
BROKEN = {
    "not_installed_anywhere:Pass": "No module named 'not_installed_anywhere'",
    "shipped_passes:DeadCode": "two passes are called 'dead-code'",
    "shipped_passes:Demanding": "argument: 'needed'",
    "shipped_passes:Shipped.name": "neither a pass nor a module",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that offers passes, on the path as pip leaves one."""
    monkeypatch.setattr(registry, "_known", registered())
    (tmp_path / "shipped_passes.py").write_text(SHIPPED)
    info = tmp_path / "shipped-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shipped\nVersion: 1.0\n")
    offered = [f"e{i} = {place}" for i, place in enumerate((*BROKEN, *USABLE))]
    (info / "entry_points.txt").write_text("\n".join(["[recompile.passes]", *offered]))
    monkeypatch.syspath_prepend(tmp_path)
    registry._load.cache_clear()
    yield
    sys.modules.pop("shipped_passes", None)


def test_they_are_known_and_what_cannot_be_used_is_left_out_and_told_once(installed):
    ours = registry._known["dead-code"]
    with pytest.warns(UserWarning) as caught:
        known = registered()
    assert {"shipped", "registered"} <= known.keys() and known["dead-code"] is ours
    assert "demanding" not in known
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(BROKEN)
    for sentence, (place, why) in zip(said, BROKEN.items(), strict=True):
        assert f"= {place} of package shipped is left out: " in sentence and why in sentence
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {"shipped", "registered"} <= {each.name() for each in parse_passes("default")}
