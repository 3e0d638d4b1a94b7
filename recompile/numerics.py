"""Whether a pass changes the numbers: the graph run on the example inputs, before and after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from .errors import RecompileError
from .graph.walls import is_random, is_wall
from .report import user_line
from .verify import Snapshot

log = logging.getLogger("recompile")

LEVELS = ("exact", "reassociate", "fast")
_TOLERANCE: dict[str, dict[str, Any]] = {
    "exact": {"rtol": 0, "atol": 0},
    "reassociate": {},  # what torch.testing allows for the dtype
    "fast": {"rtol": 1e-2, "atol": 1e-3},
}


class Numerics:
    """Runs a graph on the example inputs before and after each pass: `options={"verify": "numerics"}`.

    Graphs with effects or random numbers are not run: the caller would see the effects.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.inputs = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
        why_not = self._why_not(gm.graph)
        if why_not:
            log.warning("verify=numerics is not possible for a graph: %s", why_not)
        self.before = None if why_not else self._run(gm)

    def check(self, gm: fx.GraphModule, level: str, before: Snapshot) -> None:
        """Compares with the results before the pass, to the tolerance of its level of numerics.

        Raises:
            RecompileError: they differ; the message says which output, by how much, and the first node that differs.
        """
        if self.before is None:
            return
        after = self._run(gm)
        for i, (old, new) in enumerate(zip(self.before, after, strict=True)):
            difference = _difference(new, old, level)
            if difference:
                node = self._first_changed(gm, level, before) or _output(gm.graph, i)
                raise RecompileError(
                    f"the pass changed the numbers of output {i}, first those of node {node.name}",
                    got=difference,
                    where=user_line(node),
                )
        self.before = after

    def _first_changed(self, gm: fx.GraphModule, level: str, before: Snapshot) -> fx.Node | None:
        """The first node that the pass kept and whose value differs; the new node that it reads, if there is one."""
        was, now = self._values(gm, before.copy), self._values(gm, gm.graph)
        node: fx.Node
        for node in gm.graph.nodes:
            twin = before.twins.get(node)
            if twin is not None and _difference(now[node], was[twin], level):
                return next((x for x in node.all_input_nodes if x not in before.twins), node)
        return None

    def _values(self, gm: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, Any]:
        """What each node but the output computes; held all at once."""
        interpreter = fx.Interpreter(gm, garbage_collect_values=False, graph=graph)
        with torch.no_grad():
            interpreter.run(*self.inputs)
        return interpreter.env

    def _why_not(self, graph: fx.Graph) -> str:
        if not self.inputs or any(isinstance(x, FakeTensor) for x in self.inputs):
            return "there are no real inputs"
        barred = next((node for node in graph.nodes if is_wall(node) or is_random(node)), None)
        return f"node {barred.name} has an effect or draws random numbers" if barred else ""

    def _run(self, gm: fx.GraphModule) -> list[Any]:
        with torch.no_grad():
            results = fx.Interpreter(gm).run(*self.inputs)
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in tree_leaves(results)]


def _output(graph: fx.Graph, index: int) -> fx.Node:
    output = graph.output_node()
    found = tree_leaves(output.args[0])[index]
    return found if isinstance(found, fx.Node) else output


def _difference(new: Any, old: Any, level: str) -> str:
    """How two values, or two lists of them, differ beyond the level's tolerance; "" if they do not.

    Only tensors and numbers are compared: a node may also be a device or a size.
    """
    for a, b in zip(tree_leaves(new), tree_leaves(old), strict=True):
        if not isinstance(b, (torch.Tensor, int, float)):
            continue
        try:
            torch.testing.assert_close(a, b, equal_nan=True, **_tolerance(level, b))
        except AssertionError as error:
            return str(error)
    return ""


def _tolerance(level: str, value: Any) -> dict[str, Any]:
    floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return _TOLERANCE[level] if floating else _TOLERANCE["exact"]
