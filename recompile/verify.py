"""What is checked of a graph after every pass, so that a wrong rewrite is undone instead of compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from .errors import RecompileError
from .graph.walls import is_wall
from .memory import Memory
from .report import user_line
from .rewrite import Effects, same, same_strides
from .rewrite.build import ambient
from .rewrite.effects import autocast_at, storages
from .wording import plural

_UNFORESEEABLE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class Snapshot:
    """A graph as it was before a pass: to see what the pass changed, to check that, and to take it back."""

    def __init__(self, graph: fx.Graph) -> None:
        self._was = {node: (node.target, node.args, node.kwargs) for node in graph.nodes}
        self._inputs, self._outputs = _inputs(graph), _outputs(graph)
        self._walls = [node for node in graph.nodes if is_wall(node)]
        self.twins: dict[fx.Node, fx.Node] = {}  # by node of the graph: the copy's
        self.copy = fx.Graph()
        self.copy.output(self.copy.graph_copy(graph, self.twins))
        self.copy.output_node().meta = dict(graph.output_node().meta)
        self.copy.set_codegen(graph._codegen)
        for old, new in self.twins.items():  # AOTAutograd looks for it on placeholders
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source

    def restore(self, gm: fx.GraphModule) -> None:
        """Make `gm` compute what it did; the snapshot is used up."""
        gm.graph = self.copy

    def is_current(self, graph: fx.Graph) -> bool:
        """Whether nothing changed since."""
        nodes = list(graph.nodes)
        return nodes == list(self._was) and not list(self._changed(graph))

    def check(self, graph: fx.Graph) -> None:
        """Compares with the graph as a pass left it. A new node without `meta["val"]` is given one.

        Raises:
            RecompileError: an output or a changed node has another shape, dtype or device than before or than
                it says; an output is another tensor than before, or shares memory with others; an input is written to
                otherwise; inputs or walls changed their order.
        """
        if _inputs(graph) != self._inputs:
            raise RecompileError("the pass changed the graph's inputs")
        self._check_walls(graph)
        effects = Effects(graph)
        for node in self._changed(graph):
            if node not in self._was or not _calls_alike(self._was[node], node):
                _check_value(node, effects)
        _check_outputs(self._outputs, _outputs(graph))
        self._check_memory(graph)

    def _changed(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The nodes that are new, or have other arguments."""
        for node in graph.nodes:
            if self._was.get(node) != (node.target, node.args, node.kwargs):
                yield node

    def _check_walls(self, graph: fx.Graph) -> None:
        walls = {node: None for node in graph.nodes if is_wall(node)}
        kept = [node for node in self._walls if node in walls]
        for before, after in zip(kept, [node for node in walls if node in self._was], strict=False):
            if before is not after:
                raise RecompileError(
                    "the pass changed the order of nodes with effects",
                    expected=f"{before.name} first",
                    got=f"{after.name} first",
                    where=user_line(after),
                )

    def _check_memory(self, graph: fx.Graph) -> None:
        before = Memory(self.copy)
        after = Memory(graph, before, self.twins)
        for name in before.writers | after.writers:
            old, new = before.writers[name], after.writers[name]
            if len(old) != len(new):
                kept = {self.twins.get(node) for node in new}
                gone = [node for node in old if node not in kept]
                raise RecompileError(
                    f"the pass changed what is written to {name}",
                    expected=plural(len(old), "write"),
                    got=str(len(new)),
                    where=user_line((gone or new)[0]),
                )
        for i, (was, now) in enumerate(zip(before.shared, after.shared, strict=True)):
            if was != now:
                raise RecompileError(
                    f"the pass changed what output {i} shares memory with",
                    expected=", ".join(was) or "nothing",
                    got=", ".join(now) or "nothing",
                )


def _calls_alike(before: tuple[Any, Any, Any], node: fx.Node) -> bool:
    """Whether `node` calls what it did with tensors laid out as before, so that its value is what it was.

    Computing it again takes milliseconds where sizes are symbolic.
    """
    target, args, kwargs = before
    old, new = tree_leaves((args, kwargs)), tree_leaves((node.args, node.kwargs))
    return target is node.target and len(old) == len(new) and all(map(_laid_out_alike, old, new))


def _laid_out_alike(a: object, b: object) -> bool:
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and a == b
    x, y = a.meta.get("val"), b.meta.get("val")
    if a is b or not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return a is b
    fixed = ((v.dtype, v.device, v.layout, type(v)) for v in (x, y))
    return len(set(fixed)) == 1 and same(x.shape, y.shape) and same_strides(x, y)


def _check_value(node: fx.Node, effects: Effects) -> None:
    """Compares a node's value with what its operator makes of its arguments' values."""
    if node.op != "call_function" or is_wall(node) or _is_unforeseeable(node):
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target: Any = node.target
    # The value, too: what draws numbers of dynamic sizes has no tensor among its arguments.
    with _no_guards((args, kwargs, node.meta.get("val"))), autocast_at(effects.autocasts[node]):
        try:
            derived = target(*args, **kwargs)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            raise RecompileError(
                f"node {node.name} cannot be computed: {error}", where=user_line(node)
            ) from error
    claimed, given = node.meta.setdefault("val", derived), set(storages([*node.all_input_nodes]))
    if not _alike(claimed, derived):
        raise RecompileError(
            f"node {node.name} has another value than its meta['val'] says",
            expected=_show(claimed),
            got=_show(derived),
            where=user_line(node),
        )
    if given & set(storages(claimed)) != given & set(storages(derived)):
        node.meta["val"] = derived  # a view, or no longer one


def _is_unforeseeable(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and not _UNFORESEEABLE.isdisjoint(node.target.tags)


@contextmanager
def _no_guards(values: Any) -> Iterator[None]:
    """As `ambient`, and what the operators learn about symbolic sizes has no consequences."""
    mode = next((t.fake_mode for t in tree_leaves(values) if isinstance(t, FakeTensor)), None)
    with ExitStack() as stack:
        stack.enter_context(ambient(values))
        if mode is not None and mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
        yield


def _alike(a: Any, b: Any) -> bool:
    """Whether two values may be the same one: type, dtype, device and sizes, as far as those are known."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim()) and all(
            not statically_known_true(m != n) for m, n in zip(a.shape, b.shape, strict=True)
        )
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _outputs(graph: fx.Graph) -> list[tuple[Any, str]]:
    """For each output its value, and which input or earlier output it is."""
    returned = tree_leaves(graph.output_node().args[0])
    return [(_value(out), _identity(out, returned)) for out in returned]


def _value(out: object) -> Any:
    return out.meta.get("val") if isinstance(out, fx.Node) else out


def _identity(out: object, returned: list[object]) -> str:
    if isinstance(out, fx.Node) and out.op == "placeholder":
        return f"input {out.name}"
    return f"output {returned.index(out)}" if isinstance(out, fx.Node) else "a constant"


def _check_outputs(before: list[tuple[Any, str]], after: list[tuple[Any, str]]) -> None:
    if len(before) != len(after):
        raise RecompileError(
            "the pass changed the number of outputs", expected=str(len(before)), got=str(len(after))
        )
    for i, ((old, was), (new, now)) in enumerate(zip(before, after, strict=True)):
        if not _alike(old, new):
            raise RecompileError(f"the pass changed output {i}", expected=_show(old), got=_show(new))
        if was != now:
            raise RecompileError(f"the pass changed what output {i} is", expected=was, got=now)


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, (list, tuple)) else repr(value)
