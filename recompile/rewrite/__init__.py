"""The pattern language, the matcher and its refusals: what pass authors write with."""

from .base import Context, Pass, Refuse
from .build import Builder
from .effects import Effects, is_pure
from .pattern import Ops, Pattern, any_of, each, optional
from .registry import register, registered
from .replace import replace, same_strides
from .rule import Match, Rule
from .schema import arguments, count_from_front, same

__all__ = [
    "Builder",
    "Context",
    "Effects",
    "Match",
    "Ops",
    "Pass",
    "Pattern",
    "Refuse",
    "Rule",
    "any_of",
    "arguments",
    "count_from_front",
    "each",
    "is_pure",
    "optional",
    "register",
    "registered",
    "replace",
    "same",
    "same_strides",
]
