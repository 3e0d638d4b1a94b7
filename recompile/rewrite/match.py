"""The matcher: does a pattern fit at a node, and if not, how far did it get?

It tries every way in which the pattern could fit (operands swapped, alternatives) and undoes what a way that
fails has bound. The failure that got farthest is the *nearest miss*, and the report shows it, so that a rule
which almost fired says why it did not. Near is a failure past two operators of the pattern, or past the only one
that it has; there what a call is given counts, such as a dim, and not what computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from recompile.rewrite.bindings import UNBOUND, Bindings, Scope
from recompile.rewrite.effects import Effects, draws, is_pure
from recompile.rewrite.pattern import AnyOf, Anything, Const, Each, Operator, Pattern, Var, inside, names
from recompile.rewrite.schema import (
    REQUIRED,
    Argument,
    bind,
    is_commutative,
    is_size,
    normal,
    op_name,
    same,
    schema,
)
from recompile.wording import plural

_NEAR = 2  # operators that must have fitted for a miss to be worth telling, if the pattern has as many


@dataclass(frozen=True)
class Found:
    """One fit of a pattern. `roots` are the nodes of its outputs, `inner` all operators that it covers."""

    roots: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    names: dict[str, Any]
    dims: dict[str, Any]


class Matcher:
    """Finds one pattern, or a tuple of patterns that share parts, in one graph."""

    def __init__(self, pattern: Pattern | tuple[Pattern, ...], effects: Effects) -> None:
        self.outputs = pattern if isinstance(pattern, tuple) else (pattern,)
        self.effects = effects
        self._targets = [_targets(output) for output in self.outputs]
        self.names = names(self.outputs)
        self._near = min(_NEAR, sum(map(_fewest, self.outputs)))
        self._calls: dict[tuple[int, int], _Call] = {}
        self._above: dict[tuple[int, fx.Node, int], list[fx.Node]] = {}  # while nothing is rewritten

    def can_start(self, node: fx.Node) -> bool:
        """Whether the first output's operator is the one that `node` calls."""
        return id(node.target) in self._targets[0]

    def find(self, root: fx.Node) -> Found | None:
        """The first fit with the first output at `root`, or None: then `nearest` may say why."""
        self.root, self.nearest, self._best = root, None, self._near - 1
        self._bound = Bindings()
        for _ in self._match(self.outputs[0], root):
            for roots in self._others(self.outputs[1:], (root,)):
                if self._only_here(roots):
                    self._above.clear()
                    return self._found(roots)
        return None

    nearest: tuple[str, fx.Node] | None = None

    # -- one value

    def _match(self, pattern: Any, value: Any) -> Iterator[None]:
        """Yields once for every way in which `pattern` fits `value`; what it binds is undone afterwards."""
        bound = self._bound.matched(pattern)
        if bound is not UNBOUND:
            if same(bound, value):
                yield
            else:
                self._miss(
                    lambda: f"expected the same value twice, found {_show(bound)} and {_show(value)}",
                    value,
                    other=True,
                )
            return
        mark = self._bound.mark()
        if self._is_kind(pattern, value) and self._fits(pattern, value) and self._bind(pattern, value):
            if isinstance(pattern, Operator):
                yield from self._operator(pattern, value)
            elif isinstance(pattern, AnyOf):
                yield from self._any_of(pattern, value)
            elif isinstance(pattern, Each):
                yield from self._each(pattern, value)
            else:
                yield
        self._bound.undo(mark)

    def _is_kind(self, pattern: Pattern, value: Any) -> bool:
        if isinstance(pattern, Operator):
            ok = isinstance(value, fx.Node) and pattern.starts(value.target)
        elif isinstance(pattern, Var):
            ok = isinstance(value, fx.Node) and not is_size(value)
        elif isinstance(pattern, Const):
            ok = _is_constant(value)
        elif isinstance(pattern, Each):
            ok = isinstance(value, (list, tuple)) and len(value) >= pattern.at_least
        else:
            ok = isinstance(pattern, (AnyOf, Anything))
        other = isinstance(pattern, Operator)
        return ok or self._miss(
            lambda: f"expected {pattern.says()}, found {_show(value)}", value, other=other
        )

    def _fits(self, pattern: Pattern, value: Any) -> bool:
        """Whether dtype and dimensions are the expected ones; binds the dimensions' names."""
        if not pattern.dtypes and pattern.dims is None:
            return True
        tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
        if not isinstance(tensor, torch.Tensor):
            return self._miss(lambda: f"expected a tensor, found {_show(value)}", value)
        if pattern.dtypes and tensor.dtype not in pattern.dtypes:
            return self._misfit(pattern, lambda: f"{_dtypes(pattern)}, found {tensor.dtype}", value)
        return pattern.dims is None or self._shape(pattern, value, tensor.shape)

    def _shape(self, pattern: Pattern, value: fx.Node, shape: Sequence[Any]) -> bool:
        dims = pattern.dims or ()
        if dims and dims[0] is ...:
            dims, shape = dims[1:], shape[max(0, len(shape) - len(dims) + 1) :]
        if len(dims) != len(shape):
            return self._misshaped(pattern, value)
        for dim, size in zip(dims, shape, strict=True):
            known = self._bound.dim(dim, size) if isinstance(dim, str) else dim
            if not same(known, size):
                where = f" where {dim} is {known}, found {size}" if isinstance(dim, str) else ""
                return self._misshaped(pattern, value, where)
        return True

    def _misshaped(self, pattern: Pattern, value: fx.Node, where: str = "") -> bool:
        shape = value.meta["val"].shape
        return self._misfit(pattern, lambda: f"{_dims(pattern)}{where or f', found {list(shape)}'}", value)

    def _misfit(self, pattern: Pattern, why: Callable[[], str], value: fx.Node) -> bool:
        """A tensor of another dtype or shape; the operator that computes it is the expected one, if one is."""
        sure = isinstance(pattern, Operator)
        return self._miss(lambda: f"expected {pattern.says()} {why()}", value, sure=sure)

    def _bind(self, pattern: Pattern, value: Any) -> bool:
        known = self._bound.name(pattern.name) if pattern.name else UNBOUND
        if known is not UNBOUND and not same(known, value):
            return self._miss(
                lambda: f"expected the same {pattern.name} twice, found {_show(known)} and {_show(value)}",
                value,
                other=True,
            )
        scope = self._bound.scopes[-1]
        if pattern.name and known is UNBOUND:
            self._bound.set(scope.names, pattern.name, value)
        if not isinstance(pattern, Anything):
            self._bound.set(scope.keys, pattern.key, value)
        if pattern.once and isinstance(value, fx.Node):
            self._bound.set(self._bound.once, value)
        return True

    # -- patterns with parts

    def _operator(self, pattern: Operator, node: fx.Node) -> Iterator[None]:
        self._bound.set(self._bound.inner, node)
        if (why := self._fixed(node)) is not None:
            self._miss(lambda: why, node)
            return
        if not isinstance(node.target, OpOverload):
            yield from self._list(pattern.args, node.args, node)
            return
        key = id(pattern), id(node.target)  # an operator's own hash is slow
        call = self._calls.get(key) or self._calls.setdefault(key, _call(pattern, node.target))
        found = dict(zip(call.names, node.args, strict=False)) | node.kwargs
        for expected in call.orders:
            yield from self._arguments(node, expected, found)

    def _fixed(self, node: fx.Node) -> str | None:
        """Why `node` cannot be computed at another place, if that is so."""
        if not is_pure(node):
            does = "draws random numbers" if draws(node) else "writes to a tensor or has another effect"
            return f"{node.name} {does}"
        wall = self.effects.between(node, self.root)
        return None if wall is None else f"{wall.name} stands between {node.name} and {self.root.name}"

    def _arguments(
        self, node: fx.Node, expected: Sequence[_Expected], given: dict[str, Any]
    ) -> Iterator[None]:
        waiting: list[tuple[Any, Any]] = []
        for arg, value, is_pattern in expected:
            if arg.name not in given and value is arg.default:
                continue
            found = normal(node, arg, given.get(arg.name, arg.default))
            if is_pattern:
                waiting.append((value, found))
            elif not same(wanted := normal(node, arg, value), found):
                waiting.append((_Literal(node, arg, wanted), found))
        yield from self._all(waiting, node)

    def _all(self, pairs: Sequence[tuple[Any, Any]], node: fx.Node, done: int = 0) -> Iterator[None]:
        if done == len(pairs):
            yield
            return
        expected, found = pairs[done]
        for _ in self._one(expected, found, node):
            yield from self._all(pairs, node, done + 1)

    def _one(self, expected: Any, found: Any, node: fx.Node) -> Iterator[None]:
        if isinstance(expected, Pattern):
            return self._match(expected, found)
        return self._same(expected, found, node)

    def _same(self, expected: Any, found: Any, node: fx.Node) -> Iterator[None]:
        if isinstance(expected, _Literal):
            self._miss(lambda: expected.says(found), node)
        elif isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
            yield from self._list(expected, found, node)
        elif same(expected, found):
            yield
        else:
            self._miss(lambda: f"expected {_show(expected)}, found {_show(found)}", node)

    def _list(self, expected: Sequence[Any], found: Sequence[Any], node: fx.Node) -> Iterator[None]:
        if len(expected) != len(found):
            self._miss(
                lambda: f"expected {plural(len(expected), 'element')} in {node.name}, found {len(found)}",
                node,
            )
            return
        yield from self._all(list(zip(expected, found, strict=True)), node)

    def _any_of(self, pattern: AnyOf, value: Any) -> Iterator[None]:
        for option, tagged in zip(pattern.options, pattern.values, strict=True):
            mark = self._bound.mark()
            if pattern.tag:
                self._bound.set(self._bound.scopes[-1].names, pattern.tag, tagged)
            yield from self._match(option, value)
            self._bound.undo(mark)

    def _each(self, pattern: Each, value: Sequence[Any]) -> Iterator[None]:
        mark, found = self._bound.mark(), []
        for element in value:
            self._bound.scopes.append(Scope())
            fits = next((True for _ in self._one(pattern.element, element, self.root)), False)
            found.append(self._bound.scopes.pop())
            if not fits:
                self._bound.undo(mark)
                return
        self._columns(pattern, found)
        yield

    def _columns(self, pattern: Each, found: list[Scope]) -> None:
        """Bind, for each name inside an `each`, the list of what it stands for in each element."""
        here = self._bound.scopes[-1]
        for name in names(pattern.element):
            if self._bound.name(name) is UNBOUND:
                self._bound.set(here.names, name, [scope.names.get(name) for scope in found])
        for dim in {dim for scope in found for dim in scope.dims}:
            self._bound.set(here.dims, dim, [scope.dims.get(dim) for scope in found])

    # -- the whole

    def _others(self, rest: Sequence[Pattern], roots: tuple[fx.Node, ...]) -> Iterator[tuple[fx.Node, ...]]:
        if not rest:
            yield roots
            return
        for root in self._candidates(rest[0], self._targets[-len(rest)]):
            for _ in self._match(rest[0], root):
                yield from self._others(rest[1:], (*roots, root))

    def _candidates(self, pattern: Pattern, targets: set[int]) -> list[fx.Node]:
        """Nodes where another output can be: above a part of it that is bound already."""
        bound = [(self._already(p), depth) for p, depth in _depths(pattern, 0)]
        known = [(depth, node) for node, depth in bound if isinstance(node, fx.Node)]
        if not known:
            return []
        depth, node = min(known, key=lambda pair: pair[0])
        key = id(pattern), node, depth
        if key not in self._above:
            level, seen = {node: None}, {node: None}
            for _ in range(depth):
                level = {user: None for n in level for user in n.users}
                seen |= level
            self._above[key] = [n for n in seen if id(n.target) in targets]
        return [n for n in self._above[key] if n not in self._bound.inner]

    def _already(self, pattern: Pattern) -> Any:
        """What `pattern` has matched, or a pattern of the same name."""
        matched = self._bound.matched(pattern)
        return self._bound.name(pattern.name) if matched is UNBOUND and pattern.name else matched

    def _only_here(self, roots: tuple[fx.Node, ...]) -> bool:
        once, inner = self._bound.once, self._bound.inner
        pairs = (
            (node, user) for node in once if node not in roots for user in node.users if user not in inner
        )
        outside = next(pairs, None)
        if outside is None:
            return True
        node, user = outside
        return self._miss(lambda: f"{node.name} is also used by {user.name}", node, sure=True)

    def _found(self, roots: tuple[fx.Node, ...]) -> Found:
        inner = sorted(self._bound.inner, key=self.effects.order.__getitem__)
        bound = self._bound.scopes[0]
        return Found(roots, tuple(inner), dict.fromkeys(self.names) | bound.names, dict(bound.dims))

    def _miss(self, why: Callable[[], str], at: Any, sure: bool = False, other: bool = False) -> bool:
        """Keep the failure that got farthest. Always False.

        Args:
            why: makes the sentence, which costs time and is needed of few.
            sure: one more operator has fitted than is bound.
            other: something else computes what is read here, which a single operator does not make worth telling.
        """
        reached = len(self._bound.inner) + sure
        if self._is_nearer(reached, other):
            self._best = reached
            self.nearest = why(), at if isinstance(at, fx.Node) else self.root
        return False

    def _is_nearer(self, reached: int, other: bool) -> bool:
        return reached > self._best and (reached >= _NEAR or not other)


@dataclass(frozen=True)
class _Literal:
    """An argument that has not the expected value; kept until all that can be bound is."""

    node: fx.Node
    arg: Argument
    expected: Any

    def says(self, found: Any) -> str:
        call = op_name(self.node.target)
        if self.expected is REQUIRED:
            return f"expected {call} without {self.arg.name}, found {_show(found)}"
        return f"expected {call} with {self.arg.name} {_show(self.expected)}, found {_show(found)}"


class _Expected(NamedTuple):
    arg: Argument
    value: Any
    is_pattern: bool


class _Call(NamedTuple):
    """How a pattern's operator and a node's meet: the names of positional arguments, and what is expected of all."""

    names: list[str]
    orders: list[list[_Expected]]


def _call(pattern: Operator, op: OpOverload) -> _Call:
    """What the pattern expects of the arguments of `op`, in one or both orders of its operands."""
    positional = [arg.name for arg in schema(op) if arg.positional]
    given = bind(op, pattern.args, pattern.kwargs)
    if given is None:
        return _Call(positional, [])
    orders = [given]
    if is_commutative(op) and len(pattern.args) == 2 and not pattern.kwargs:
        first, second = given
        orders.append({first: given[second], second: given[first]})
    mentioned = [arg for arg in schema(op) if arg.name in given or not pattern.rest]
    values = [[(arg, order.get(arg.name, arg.default)) for arg in mentioned] for order in orders]
    return _Call(
        positional,
        [[_Expected(arg, v, any(True for _ in inside(v))) for arg, v in order] for order in values],
    )


def _starts(pattern: Pattern) -> list[Operator]:
    """The operators with which a match can start."""
    if isinstance(pattern, Operator):
        return [pattern]
    if isinstance(pattern, AnyOf):
        return [start for option in pattern.options for start in _starts(option)]
    raise TypeError(f"a pattern starts with an operator, not with {pattern.says()}")


def _targets(pattern: Pattern) -> set[int]:
    """The identities of what a node calls that a match can start at."""
    targets = [start.target for start in _starts(pattern)]
    packets = [target for target in targets if isinstance(target, OpOverloadPacket)]
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]  # type: ignore[no-untyped-call]
    return {id(target) for target in [*targets, *overloads]}


def _depths(pattern: Any, depth: int) -> Iterator[tuple[Pattern, int]]:
    """The parts of a pattern, each with the number of operators above it."""
    if isinstance(pattern, (list, tuple)):
        for part in pattern:
            yield from _depths(part, depth)
    elif isinstance(pattern, Pattern) and not isinstance(pattern, Each):
        yield pattern, depth
        for part in pattern.parts():
            yield from _depths(part, depth + isinstance(pattern, Operator))


def _fewest(pattern: Any) -> int:
    """How many operators a match of the pattern covers at least."""
    if isinstance(pattern, (list, tuple)):
        return sum(map(_fewest, pattern))
    if isinstance(pattern, AnyOf):
        return min(map(_fewest, pattern.options))
    own = isinstance(pattern, Operator)
    return own + sum(map(_fewest, pattern.parts())) if isinstance(pattern, Pattern) else 0


def _dtypes(pattern: Pattern) -> str:
    return f"of {' or '.join(map(str, pattern.dtypes))}"


def _dims(pattern: Pattern) -> str:
    return f"of shape [{', '.join('...' if d is ... else str(d) for d in pattern.dims or ())}]"


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    return not isinstance(value, fx.Node) or is_size(value)


def _show(value: Any) -> str:
    """A value in a refusal's sentence."""
    if isinstance(value, fx.Node):
        return op_name(value.target) if value.op == "call_function" else value.name
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, (list, tuple)) else str(value)
