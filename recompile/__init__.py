"""A torch.compile backend and graph optimizer for recommendation models.

`torch.compile(model, backend="recompile")` needs no import of this package; what stands here is for looking
at what happened and for writing passes.
"""

from .bisect import bisect
from .dump import dump
from .errors import RecompileError
from .explain import explain
from .options import Options
from .package import package
from .report import Report, last_report
from .rewrite import Context, Match, Pass, Refuse, Rule, any_of, each, optional, register, registered

__all__ = [
    "Context",
    "Match",
    "Options",
    "Pass",
    "RecompileError",
    "Refuse",
    "Report",
    "Rule",
    "any_of",
    "bisect",
    "dump",
    "each",
    "explain",
    "last_report",
    "optional",
    "package",
    "register",
    "registered",
]
