"""The operator of a user's region, `recompile::<name>`: shape function, autograd, and what it becomes in a trace."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from recompile.errors import RegionError
from recompile.lowering import region_cpp

if TYPE_CHECKING:
    from recompile.lowering.region import Region


# The operators that were ever defined. Where one is replaced and collected later, torch would forget the new one.
_defined: list[Any] = []


def define(region: Region) -> None:
    """Registers the operator, in place of an earlier one of this name."""

    def run(*args: Any) -> Any:
        *tensors, spec = args
        return _contiguous(region.reference(*tensors, **region.parse(spec)))

    def fake(*args: Any) -> Any:
        found = run(*args)
        return _each(found, lambda x: x.new_empty(x.shape))

    def trace(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        *tensors, spec = args
        if region.has_cpp(tensors):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        launch = region.triton if region.triton and region.has_triton(tensors) else region.reference
        with mode:
            return _contiguous(launch(*tensors, **region.parse(spec)))

    name, schema = f"recompile::{region.name}", _schema(region)
    op = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_torch_dispatch(FunctionalTensorMode, trace)
    op.register_autograd(_differentiate(region), setup_context=_save)
    _defined.append(op)
    region_cpp.register(region)


def parameters(reference: Any) -> tuple[list[str], dict[str, Any]]:
    """The names of the tensors, and the constants with their defaults.

    Raises:
        RegionError: a parameter is neither.
    """
    given = inspect.signature(reference, eval_str=True).parameters.values()
    constants = [p for p in given if p.kind is p.KEYWORD_ONLY]
    tensors = [p for p in given if p not in constants]
    for p in tensors:
        if p.kind is not p.POSITIONAL_OR_KEYWORD or p.annotation is not Tensor:
            raise RegionError(
                f"region {reference.__name__} cannot have the parameter `{p}`",
                expected="tensors, annotated as torch.Tensor, then constants, keyword-only",
                try_="move a constant behind `*`",
            )
    return [p.name for p in tensors], {p.name: p.default for p in constants}


def outputs(reference: Any) -> int:
    """How many tensors the function returns.

    Raises:
        RegionError: its annotation does not tell.
    """
    returned = inspect.signature(reference, eval_str=True).return_annotation
    parts = get_args(returned) or (returned,)
    if any(part is not Tensor for part in parts):
        raise RegionError(
            f"region {reference.__name__} cannot return `{returned}`",
            expected="`-> Tensor`, or as many in a tuple, such as `-> tuple[Tensor, Tensor]`",
        )
    return len(parts)


def _schema(region: Region) -> str:
    """The tensors, the text of the constants, the results."""
    given = ", ".join(f"Tensor {name}" for name in region.tensors)
    count = outputs(region.reference)
    returned = f"({', '.join(['Tensor'] * count)})" if count > 1 else "Tensor"
    return f"({given}, str spec) -> {returned}"


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(region: Region) -> Any:
    """The autograd formula: the backward region, or the reference computed again."""

    def formula(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        real = [x.is_floating_point() or x.is_complex() for x in inputs]
        if region.backward:
            found = region.backward.op(*grads, *inputs, ctx.spec)
        else:
            found = _recomputed(region, inputs, grads, region.parse(ctx.spec))
        each = iter(found if isinstance(found, (tuple, list)) else (found,))
        return *(next(each) if is_real else None for is_real in real), None

    return formula


def _recomputed(region: Region, inputs: Any, grads: Any, given: dict[str, Any]) -> Any:
    """The gradients of the real and complex inputs, which have gradients too where the caller keeps the graph."""
    again = torch.is_grad_enabled()

    def input_of_its_own(x: Tensor) -> Tensor:
        if again and x.requires_grad:
            return x.view_as(x)
        return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())

    fresh = [input_of_its_own(x) for x in inputs]
    with torch.enable_grad():
        found = region.reference(*fresh, **given)
    results = found if isinstance(found, tuple) else (found,)
    real = [k for k, x in enumerate(results) if x.requires_grad]
    sources = [x for x in fresh if x.requires_grad]
    return torch.autograd.grad(
        [results[k] for k in real],
        sources,
        [grads[k] for k in real],
        materialize_grads=True,
        create_graph=again,
    )


def _contiguous(found: Any) -> Any:
    return _each(found, lambda x: x.contiguous())


def _each(found: Any, change: Any) -> Any:
    return tuple(map(change, found)) if isinstance(found, (tuple, list)) else change(found)
