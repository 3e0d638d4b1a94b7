"""One node of a graph, and one of its inputs, as a dump writes them: plain text and numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils._pytree import tree_leaves

from .cost import Cost, cost
from .graph.nodes import input_name, source_name
from .report import user_line
from .torch_private.symbols import SYM
from .torch_private.symbols import example as example_size

UNKNOWN_SIZE = 64  # stands for a size that depends on data, of which no example is known


def entry(node: fx.Node) -> dict[str, Any]:
    """What `graph.json` says about a node; see docs/dump.md for the fields."""
    return {
        "name": node.name,
        "op": node.op,
        "target": target_name(node),
        "inputs": [other.name for other in node.all_input_nodes],
        "text": call_text(node),
        "value": value_text(value_of(node)),
        "line": user_line(node),
        "module": module_path(node),
        "rule": node.meta.get("recompile_rule", ""),
        "kernel": "",
        **_cost(node),
    }


def _cost(node: fx.Node) -> dict[str, int]:
    """What the node moves and computes if it runs by itself, for the sizes of the example inputs (see `cost.py`)."""
    like = next((leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)), None)
    amounts = cost(node) if like is not None else Cost()
    moved, computed = (example_size(each, like) for each in amounts)
    return {"bytes": moved, "flops": computed} if computed else {"bytes": moved}  # most nodes compute nothing


def value_of(node: fx.Node) -> Any:
    """The fake tensor, size, or tuple of those that a node computes, None if unknown."""
    return node.meta.get("val", node.meta.get("example_value"))


def target_name(node: fx.Node) -> str:
    """`aten.mm.default`, `operator.getitem`, the name of an attribute or method, or where an input comes from."""
    target: Any = node.target
    if node.op == "placeholder":
        return input_name(node)
    if isinstance(target, str | OpOverload | HigherOrderOperator):
        return str(target)
    module = str(getattr(target, "__module__", None) or "").removeprefix(
        "_"
    )  # operator's C module is _operator
    return f"{module}.{getattr(target, '__name__', target)}".removeprefix(".")


def call_text(node: fx.Node) -> str:
    """The call as one line: `aten.mm.default(x_1, w)`."""
    given = [argument_text(arg) for arg in node.args]
    given += [f"{key}={argument_text(value)}" for key, value in node.kwargs.items()]
    name = target_name(node)
    if node.op == "output":
        return f"return {given[0]}"
    if node.op in ("placeholder", "get_attr"):
        return f"self.{name}" if node.op == "get_attr" else name
    if node.op == "call_method":
        return f"{given[0]}.{name}({', '.join(given[1:])})"
    return f"{'self.' if node.op == 'call_module' else ''}{name}({', '.join(given)})"


def argument_text(value: Any) -> str:
    """An argument as Python text, nodes by name."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {argument_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(argument_text, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def value_text(value: Any) -> str:
    """`f32[64, 16]`, several in parentheses, the expression of a size, or ""."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_abbrs[value.dtype]}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(value_text, value))})"
    return str(value) if isinstance(value, (*SYM, int, float)) else ""


def module_path(node: fx.Node) -> str:
    """The path of the innermost submodule that called the operator, such as `tower.layers.0`, or ""."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return source_name(str(list(stack.values())[-1][0])).removeprefix("self").removeprefix(".")


def input_entry(node: fx.Node) -> dict[str, Any]:
    """What `inputs.json` says about an input: symbolic sizes and strides are text, such as "s77"."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return {"name": node.name, "dtype": type(value).__name__, "shape": [], "stride": [], "device": ""}
    return {"name": node.name, **_layout(value, lambda n: n if isinstance(n, int) else str(n))}


def example(value: Any) -> Any:
    """An argument of a region as JSON: tensors by layout, with an example for each symbolic size."""
    if isinstance(value, fx.Node):
        value = {"name": value.name, **_layout(value_of(value), _hint)}
    return [example(part) for part in value] if isinstance(value, (tuple, list)) else value


def _layout(tensor: torch.Tensor, number: Any) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [number(n) for n in tensor.shape],
        "stride": [number(n) for n in tensor.stride()],
        "device": str(tensor.device),
    }


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    return UNKNOWN_SIZE if size.node.hint is None else int(size.node.hint)
