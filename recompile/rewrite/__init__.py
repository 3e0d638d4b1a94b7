"""The pattern language, the matcher and its refusals: what pass authors write with."""

from .base import Context, Pass, Refuse
from .pattern import Ops, Pattern, any_of, each, optional
from .registry import register, registered
from .rule import Match, Rule
from .schema import arguments

__all__ = [
    "Context",
    "Match",
    "Ops",
    "Pass",
    "Pattern",
    "Refuse",
    "Rule",
    "any_of",
    "arguments",
    "each",
    "optional",
    "register",
    "registered",
]
