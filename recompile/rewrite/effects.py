"""What may move, merge or alias what: the order of a graph's writes, of its walls and of its memory."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from recompile.graph.walls import is_random, is_wall
from recompile.rewrite.schema import arguments, op_name
from recompile.torch_private.symbols import expression

_ENTER: Any = torch.amp.autocast_mode._enter_autocast
_EXIT: Any = torch.amp.autocast_mode._exit_autocast
_GRAD: Any = torch._C._set_grad_enabled
_INPUTS = ("placeholder", "get_attr")
# These write to their running statistics, though their schema does not say so.
_STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}

# Copied verbatim since their result's size or value depends on data; they read and do nothing else.
_READS = {"argwhere", "bincount", "item", "masked_select", "nonzero", "repeat_interleave", "unique"}
# Methods of nested tensors in the jagged layout, copied verbatim as all that works on them.
_READS_NESTED = {"lengths", "offsets", "to_padded_tensor"}


def updates_statistics(node: fx.Node) -> bool:
    """Whether `node` is a normalization that writes to its running mean and variance."""
    if not isinstance(node.target, OpOverload) or op_name(node.target) not in _STATISTICS:
        return False
    given = arguments(node)
    return bool(given[_STATISTICS[op_name(node.target)]]) and given["running_mean"] is not None


# By identity, since an operator's own hash is slow; the operator is kept, so that nothing else gets its identity.
_harmless: dict[int, tuple[Any, bool]] = {}


def _is_harmless(node: fx.Node) -> bool:
    """Whether all calls of an ATen operator are pure, known from its schema: a short cut for most nodes."""
    known = _harmless.get(id(node.target))
    if known is None:
        fixed = is_wall(node) or is_random(node) or op_name(node.target) in _STATISTICS
        known = _harmless[id(node.target)] = node.target, not fixed
    return known[1]


def is_pure(node: fx.Node) -> bool:
    """Whether `node` may be computed again, once less, or elsewhere: no effect, no random numbers."""
    if isinstance(node.target, OpOverload) and _is_harmless(node):
        return True
    return not (is_wall(node) or draws(node) or updates_statistics(node))


_DROPOUTS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
)  # they return x where p is 0


def draws(node: fx.Node) -> bool:
    """Whether `node` draws random numbers: dropout outside training, or of nothing, does not."""
    if not is_random(node):
        return False
    given = arguments(node)
    switched_off = [given.get("train"), given.get("training")].count(False)
    rate = given.get("p" if node.target in _DROPOUTS else "dropout_p")
    return not switched_off and not (isinstance(rate, (int, float)) and rate == 0)


def _only_reads(node: fx.Node) -> bool:
    """Whether a call that was copied verbatim is known to write to nothing."""
    if node.op == "call_method" and node.target in _READS_NESTED:
        given = node.all_input_nodes[0].meta.get("val")
        return isinstance(given, torch.Tensor) and given.is_nested
    return "unbacked_bindings" in node.meta and op_name(node.target) in _READS


def _hides(node: fx.Node) -> bool:
    """Whether it is unknown what `node` does."""
    return is_wall(node) and not (
        isinstance(node.target, OpOverload) or node.target is operator.setitem or _only_reads(node)
    )


def writes_to(node: fx.Node) -> list[Any]:
    """The arguments that `node` writes to; all nodes among them where it hides what it does."""
    if updates_statistics(node):
        given = arguments(node)
        return [given["running_mean"], given["running_var"]]
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        given = arguments(node)
        infos = [(arg.name, arg.alias_info) for arg in node.target._schema.arguments]
        return [given[name] for name, info in infos if info is not None and info.is_write]
    if node.target is operator.setitem:
        return [node.args[0]]
    return list(node.all_input_nodes) if _hides(node) else []


def storages(value: Any) -> Iterator[int]:
    """Identities of the memory under a node's value, or under an argument made of nodes."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value.untyped_storage()._cdata
        elif value.is_nested:
            parts, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from storages([getattr(value, name) for name in parts])  # values, offsets, lengths
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from storages(part)


class Effects:
    """The order of effects in one graph. Nodes made later come in by `adopt`."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {}
        self.region: dict[fx.Node, int] = {}  # how many walls of unknown effect stand before a node
        self.autocasts: dict[fx.Node, tuple[fx.Node, ...]] = {}  # the autocast switches open at a node
        self.walls: list[fx.Node] = []  # the one at `i` ends region `i`
        self.owner: dict[int, fx.Node] = {}  # memory -> the first node that has it
        self._holders: dict[int, list[fx.Node]] = {}
        self.grad_switches: list[fx.Node] = []
        self._writes: dict[int, list[int]] = {}
        self._by_order: list[fx.Node] = []
        open_now: tuple[fx.Node, ...] = ()
        for node in graph.nodes:
            self.order[node], self.region[node] = len(self._by_order), len(self.walls)
            self.autocasts[node] = open_now
            self._by_order.append(node)
            self.learn(node)
            open_now = _switch(node, open_now)
            if not is_pure(node):
                self._note(node)
        self._held = {s for n in graph.nodes if n.op in _INPUTS for s in storages(n)}
        self._output = graph.output_node()
        # The sizes that the graph's inputs are.
        self.sizes = {
            expression(n.meta["val"]): n
            for n in graph.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.SymInt)
        }
        self._outputs = Counter(s for s in _memory_of_each(self._output))

    def adopt(self, new: fx.Node, like: fx.Node) -> None:
        """Treat `new` as standing where `like` stands; `learn` it once its value is known."""
        self.order[new], self.region[new] = self.order[like], self.region[like]
        self.autocasts[new] = self.autocasts[like]

    def learn(self, node: fx.Node) -> None:
        """Take in the memory of `node`'s value."""
        for storage in storages(node):
            self.owner.setdefault(storage, node)
            self._holders.setdefault(storage, []).append(node)

    def sharing(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that share memory with `node`, itself included."""
        memory = set(storages(node))
        held = (n for storage in memory for n in self._holders.get(storage, ()))
        return {n for n in held if not n._erased and memory & set(storages(n))}

    def between(self, node: fx.Node, other: fx.Node) -> fx.Node | None:
        """The wall that keeps `node` from being computed where `other` stands, or None."""
        if not self._writes and self.region[node] == self.region[other]:
            return None
        low, high = sorted((node, other), key=self.order.__getitem__)
        if self.region[low] != self.region[high]:
            return self.walls[self.region[low]]
        return self._write_between(low, high, [*node.all_input_nodes, node])

    def overwritten(self, node: fx.Node, other: fx.Node) -> fx.Node | None:
        """What writes to the memory of `node` before `other`, which stands later and reads it; or None."""
        return self._write_between(node, other, [node])

    def _write_between(self, low: fx.Node, high: fx.Node, of: list[fx.Node]) -> fx.Node | None:
        for storage in storages(of) if self._writes else ():
            places = self._writes.get(storage, [])
            at = bisect_right(places, self.order[low])
            if at < len(places) and places[at] < self.order[high]:
                return self._by_order[places[at]]
        return None

    def why_not_alias(self, old: fx.Node, new: fx.Node, made: Sequence[fx.Node] = ()) -> str:
        """Why `new`, which shares memory with others than `old` does, must not take its place; "" if it may.

        A graph output that was fresh must not become an input or another output, nor the other way round,
        and a copy must stay one if either side is written in place.

        Args:
            made: the nodes that were made to replace `old`; what only they have is fresh.
        """
        if self._output in old.users and new.op in _INPUTS:
            return f"{old.name} is a graph output, which must not become the input {new.name}"
        if self._output in old.users and self._output in new.users:
            return f"{old.name} and {new.name} are graph outputs, which must stay apart"
        before, after = set(storages(old)), set(storages(new))
        if before == after or not (self._shared(before, [old]) or self._shared(after, made)):
            return ""
        for storage in before | after:
            if storage in self._writes:
                return f"{self._by_order[self._writes[storage][0]].name} writes in place to this memory"
        for storage in before:
            if self._outputs[storage] and self._exposed(storage, old, after):
                return "it would change which inputs and outputs of the graph share memory"
        return ""

    def is_written(self, node: fx.Node) -> bool:
        """Whether anything in the graph writes to the memory of `node`."""
        return any(storage in self._writes for storage in storages(node))

    def writers(self, storage: int) -> list[fx.Node]:
        """The nodes that write to this memory, in order."""
        return [self._by_order[place] for place in self._writes.get(storage, ())]

    def written(self) -> list[fx.Node]:
        """The first node of each memory that is written to, in the order of the first writes."""
        return list(dict.fromkeys(self.owner[storage] for storage in self._writes))

    def _exposed(self, storage: int, old: fx.Node, after: set[int]) -> bool:
        others = storage in self._held or (self._outputs[storage] > 1 and self._shared({storage}, [old]))
        return others or any(s in self._held or self._outputs[s] for s in after)

    def _shared(self, found: Iterable[int], by: Sequence[fx.Node]) -> bool:
        """Whether the memory was there before the nodes `by`."""
        return any(self.owner.get(s) not in by for s in found)

    def _note(self, node: fx.Node) -> None:
        """Remember what `node` does to those after it."""
        if _hides(node):
            self.walls.append(node)
            if node.target is _GRAD:
                self.grad_switches.append(node)
        for storage in storages(writes_to(node)):
            self._writes.setdefault(storage, []).append(self.order[node])


def _memory_of_each(output: fx.Node) -> Iterator[int]:
    """The memory of each of the nodes that a graph returns."""
    for node in output.all_input_nodes:
        yield from set(storages(node))


def _switch(node: fx.Node, open_now: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    if node.target is _ENTER:
        return (*open_now, node)
    return tuple(n for n in open_now if n is not node.args[0]) if node.target is _EXIT else open_now


@contextmanager
def autocast_at(switches: tuple[fx.Node, ...]) -> Iterator[None]:
    """torch's autocast state as these `_enter_autocast` nodes leave it."""
    cached = torch.is_autocast_cache_enabled()
    modes = [_ENTER(*node.args) for node in switches]
    torch.set_autocast_cache_enabled(False)  # it would keep our fake tensors
    try:
        yield
    finally:
        for mode in reversed(modes):
            _EXIT(mode)
        torch.set_autocast_cache_enabled(cached)
