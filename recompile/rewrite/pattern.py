"""The pattern language: what a rule looks for, written like the model it looks for.

    def pattern(self, op):
        rows = op.embedding(op.var("table", dims=("V", "D")), op.var("ids", dims=("B", "L")))
        return op.sum(rows.used_once(), dim=[1])

A pattern is built once and only compared; it never runs. Names, dimensions and the matcher's rules are told
at `Ops`, the object that a rule's `pattern` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload, OpOverloadPacket

from recompile.errors import RecompileError
from recompile.rewrite.schema import REQUIRED, bind, op_name, schema

P = TypeVar("P", bound="Pattern")
Dim = str | int | EllipsisType


@dataclass(frozen=True, eq=False)
class Pattern:
    """A condition on one value. Using the same pattern object twice asks for the same node twice."""

    name: str = field(default="", kw_only=True)
    dims: tuple[Dim, ...] | None = field(default=None, kw_only=True)
    dtypes: tuple[torch.dtype, ...] = field(default=(), kw_only=True)
    once: bool = field(default=False, kw_only=True)
    key: object = field(default_factory=object, kw_only=True, repr=False)

    def named(self: P, name: str) -> P:
        """The same pattern; what it matches is `m[name]`."""
        return replace(self, name=name)

    def shaped(self: P, *dims: Dim) -> P:
        """The same pattern for a tensor of these dimensions; see `Ops.var`."""
        return replace(self, dims=dims)

    def typed(self: P, *dtypes: torch.dtype) -> P:
        """The same pattern for a tensor of one of these dtypes."""
        return replace(self, dtypes=dtypes)

    def used_once(self: P) -> P:
        """The same pattern for a value that nothing outside of the match uses."""
        return replace(self, once=True)

    def parts(self) -> Sequence[Any]:
        """The patterns in this one."""
        return ()

    def says(self) -> str:
        """What it stands for, in a sentence that begins with "expected"."""
        return self.name or "anything"


@dataclass(frozen=True, eq=False)
class Anything(Pattern):
    """Any value at all."""


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """A tensor, however it was computed."""

    def says(self) -> str:
        return f"a tensor {self.name}"


@dataclass(frozen=True, eq=False)
class Const(Pattern):
    """A Python constant, a size, or a list of those."""

    def says(self) -> str:
        return f"a constant {self.name}"


@dataclass(frozen=True, eq=False)
class Operator(Pattern):
    """A call of `target`: an operator, one overload of it, or a Python function."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rest: bool = False  # whether arguments that are not mentioned may have any value

    def parts(self) -> Sequence[Any]:
        return [*self.args, *self.kwargs.values()]

    def says(self) -> str:
        return op_name(self.target)

    def starts(self, target: Any) -> bool:
        """Whether a node with this target can match."""
        return target is self.target or (
            isinstance(target, OpOverload) and target.overloadpacket is self.target
        )


@dataclass(frozen=True, eq=False)
class Each(Pattern):
    """A list of any length, each element like `element`."""

    element: Any
    at_least: int = 1

    def parts(self) -> Sequence[Any]:
        return [self.element]

    def says(self) -> str:
        return f"a list of at least {self.at_least}"


@dataclass(frozen=True, eq=False)
class AnyOf(Pattern):
    """One of several patterns, the first that fits; `m[tag]` is its entry in `values`."""

    options: tuple[Pattern, ...]
    tag: str = ""
    values: tuple[Any, ...] = ()

    def parts(self) -> Sequence[Any]:
        return self.options

    def says(self) -> str:
        return " or ".join(option.says() for option in self.options)


def each(element: Any, *, at_least: int = 1) -> Each:
    """A list argument of any length, each element like `element`, such as the inputs of `cat`.

    Names inside stand for lists, one entry an element, None where an element has no such part. A name or
    pattern object that was matched before the list must be the same for all elements. The first way in which
    an element fits is kept.
    """
    return Each(element, at_least)


def any_of(*options: Pattern, tag: str = "") -> AnyOf:
    """The first of `options` that fits; `m[tag]` is its number, from 0."""
    return AnyOf(options, tag, tuple(range(len(options))))


def optional(operator: Operator, absent: Pattern | None = None, *, tag: str = "") -> AnyOf:
    """`operator` or, where it is absent, what is left; `m[tag]` tells whether it was there.

    Args:
        absent: the pattern of what is left: the operator's first argument unless said.
    """
    return AnyOf((operator, operator.args[0] if absent is None else absent), tag, (True, False))


def inside(pattern: Any) -> Iterator[Pattern]:
    """`pattern` and all patterns in it."""
    if isinstance(pattern, Pattern):
        yield pattern
        for part in pattern.parts():
            yield from inside(part)
    elif isinstance(pattern, (list, tuple)):
        for part in pattern:
            yield from inside(part)


def names(pattern: Any) -> set[str]:
    """All names that a match of `pattern` can bind."""
    found = list(inside(pattern))
    return {p.name for p in found if p.name} | {p.tag for p in found if isinstance(p, AnyOf) and p.tag}


class Ops:
    """Makes patterns: `op.sum(x, dim=[1])` is a call of any overload of `aten.sum`.

    Arguments go by the schema's names. One that is not mentioned must have the schema's default, unless the
    last positional argument is `...`. The operands of add, mul, maximum, minimum, eq, ne and the logical and
    bitwise and/or/xor are tried both ways. `op.sum.dim_IntList` asks for one overload, and `op.call` for an
    operator that is not ATen's or whose name is taken here (`var`, `any`).
    """

    any = Anything()

    def var(self, name: str, *, dims: Sequence[Dim] | None = None, dtype: Any = ()) -> Var:
        """A tensor, however it was computed; used twice, it must be the same tensor.

        Args:
            dims: a name with a capital is one size in the whole match, a lower-case name is free, an int is
                itself, and `...` in front stands for any dimensions.
            dtype: a dtype or several.
        """
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        return Var(name=name, dims=None if dims is None else tuple(dims), dtypes=dtypes)

    def const(self, name: str) -> Const:
        """A Python constant, a size, or a list of those."""
        return Const(name=name)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Operator:
        """A call of `target`, such as `torch.ops.aten.var`, `operator.getitem` or a custom operator."""
        rest = bool(args) and args[-1] is ...
        args = args[:-1] if rest else args
        _check_call(target, args, kwargs, rest)
        return Operator(target, args, kwargs, rest)

    def __getattr__(self, name: str) -> _Maker:
        return _Maker(self.call, aten_packet(name))


def aten_packet(name: str) -> OpOverloadPacket:
    """The ATen operator of this name, or of this name behind an underscore.

    Raises:
        RecompileError: there is none.
        AttributeError: there is none, and `name` is one that Python asks for.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    for known in (name, f"_{name}"):
        if hasattr(torch.ops.aten, known):
            packet: OpOverloadPacket = getattr(torch.ops.aten, known)
            return packet
    raise RecompileError(f"aten has no operator {name!r}", try_="op.call(torch.ops.<library>.<name>, ...)")


def _check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rest: bool) -> None:
    """Raises RecompileError where no overload of `target` can be called like this: nothing would ever match."""
    packet = isinstance(target, OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    if not all(isinstance(overload, OpOverload) for overload in overloads):
        return
    calls = [(overload, bind(overload, args, kwargs)) for overload in overloads]
    fitting = [(overload, given) for overload, given in calls if given is not None]
    if not fitting:
        raise RecompileError(
            f"{op_name(target)} cannot be called like this in a pattern",
            expected=" or ".join(str(overload._schema) for overload in overloads[:3]),
            got=f"{len(args)} positional, {', '.join(kwargs) or 'no'} named",
        )
    missing = [_missing(overload, given) for overload, given in fitting]
    if all(missing) and not rest:
        raise RecompileError(
            f"the pattern does not say what {', '.join(missing[0])} of {op_name(target)} is",
            try_="op.any for any value, or ... behind the positional arguments for all that is left",
        )


def _missing(overload: OpOverload, given: dict[str, Any]) -> list[str]:
    return [arg.name for arg in schema(overload) if arg.default is REQUIRED and arg.name not in given]


@dataclass(frozen=True)
class _Maker:
    """`op.sum`, to be called, or asked for an overload."""

    make: Callable[..., Any]
    packet: OpOverloadPacket

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(self.packet, *args, **kwargs)

    def __getattr__(self, overload: str) -> Callable[..., Any]:
        target = getattr(self.packet, overload)
        return lambda *args, **kwargs: self.make(target, *args, **kwargs)
