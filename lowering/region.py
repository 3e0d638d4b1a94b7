"""A region op of a user's own: `@region` on what it computes in plain PyTorch, with a generator of C++.

    @region(cpp=cross_cpp)
    def cross(x0: Tensor, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x0 * x * scale

is `torch.ops.recompile.cross(x0, x, spec)`, where `spec` is the text of the constants. While AOTAutograd traces, the op
stays where it has a kernel in C++, and becomes its Triton launch or its reference elsewhere. docs/writing-a-lowering.md
shows one end to end.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from recompile.errors import RegionError
from recompile.lowering import region_cpp, region_op
from recompile.lowering.fingerprint import fingerprint_of
from recompile.lowering.record import from_text

regions: dict[str, "Region"] = {}


@dataclass(frozen=True, eq=False)
class Region:
    """What `@region` makes of a function. `op` is the operator, for patterns and rewrites."""

    reference: Callable[..., Any]
    cpp: Callable[..., str] | None
    triton: Callable[..., Any] | None
    backward: "Region | None"
    dtypes: tuple[torch.dtype, ...]
    sentence: str
    tensors: tuple[str, ...]
    constants: dict[str, Any]  # with their defaults
    fingerprint: str

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def op(self) -> OpOverload:
        found: OpOverload = getattr(torch.ops.recompile, self.name).default
        return found

    def __call__(self, *tensors: Tensor, **constants: Any) -> Any:
        return self.op(*tensors, self.spec(**constants))

    def spec(self, **constants: Any) -> str:
        """The op's last argument: all constants, and a digest of the code, so that caches miss when it changes.

        Raises:
            RegionError: a constant is unknown, or one without a default is missing.
        """
        values = self.constants | constants
        if values.keys() != self.constants.keys() or inspect.Parameter.empty in values.values():
            expected = ", ".join(self.constants) or "none"
            raise RegionError(
                f"region {self.name} was given other constants", expected=expected, got=str(constants)
            )
        text = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"Spec({text})  # {self.fingerprint}"

    @staticmethod
    def parse(spec: str) -> dict[str, Any]:
        """The constants in the text of a spec."""
        found: dict[str, Any] = from_text(spec, {"Spec": dict})
        return found

    def has_cpp(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the generator of C++ is for these tensors."""
        known = all(x.dtype in self.dtypes for x in tensors if x.is_floating_point())
        return bool(self.cpp) and known and all(x.device.type == "cpu" for x in tensors)

    def has_triton(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the Triton launch is for these tensors."""
        return bool(self.triton) and all(x.device.type == "cuda" for x in tensors)

    def describe(self, node: fx.Node) -> str:
        """The line of the report: the sentence, the inputs' shapes, and whether there is a kernel."""
        given: Any = node.args[:-1]
        tensors = [x.meta["val"] for x in given]
        shapes = [f"{name} {list(x.shape)}" for name, x in zip(self.tensors, tensors, strict=True)]
        line = f"{self.sentence}; {', '.join(shapes)}"
        if self.has_cpp(tensors) or self.has_triton(tensors):
            return line
        kinds = sorted({f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}" for x in tensors})
        return f"{line}; no kernel for {', '.join(kinds)}: its reference is compiled"


def region(
    *,
    cpp: Callable[..., str] | None = None,
    triton: Callable[..., Any] | None = None,
    backward: Region | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    describe: str = "",
) -> Callable[[Callable[..., Any]], Region]:
    """Makes an operator of a function in plain PyTorch, which is its reference, shape function and fallback.

    The function takes tensors, annotated as such, then keyword-only constants (numbers, strings, truths, tuples of
    them), and returns a new tensor or a tuple of them. Running the same definition again, as a notebook does,
    replaces the region.

    Args:
        cpp: `cpp(*inputs, *outputs, threads=..., **constants)` gives the text of a C++ function's body for CPUs. The
            operands are `recompile.lowering.Operand`s, contiguous; `threads` is how many OpenMP may use.
        triton: as the function, for GPUs, launching kernels through `torch.library.wrap_triton`.
        backward: the region of the gradients. It takes the gradients of the outputs, then the inputs, with the same
            constants, and returns the gradient of each floating point input. Without it autograd goes through the
            function, computed again in the backward.
        dtypes: those of the floating point inputs that `cpp` is for.
        describe: what the report says; the first line of the docstring unless given.

    Raises:
        RegionError: the function has other parameters, the backward does not fit, or the name is taken.
    """

    def make(reference: Callable[..., Any]) -> Region:
        sentence = describe or (inspect.getdoc(reference) or reference.__name__).splitlines()[0].rstrip(".")
        tensors, constants = region_op.parameters(reference)
        code = fingerprint_of(*(f for f in (reference, cpp, triton, *_functions(backward)) if f))
        made = Region(reference, cpp, triton, backward, dtypes, sentence, tuple(tensors), constants, code)
        _check(made)
        region_op.define(made)
        regions[made.name] = made
        return made

    return make


def _functions(made: Region | None) -> tuple[Any, ...]:
    return (made.reference, made.cpp, made.triton) if made else ()


def _check(made: Region) -> None:
    """Refuses what cannot work, before anything is registered."""
    other = regions.get(made.name)
    taken = hasattr(torch.ops.recompile, made.name) if other is None else _place(other) != _place(made)
    if taken:
        raise RegionError(
            f"two region operators are called {made.name!r}",
            got=f"{_place(other) if other else 'one of recompile'} and {_place(made)}",
            try_="rename the function",
        )
    backward, wanted = made.backward, f"{made.name}_backward({', '.join(made.constants)})"
    if backward and (got := f"{backward.name}({', '.join(backward.constants)})") != wanted:
        raise RegionError(
            f"the backward of region {made.name} has another name or other constants",
            expected=wanted,
            got=got,
        )
    if made.cpp:
        _check_operands(made, region_cpp.names(made.cpp))


def _check_operands(made: Region, names: list[str]) -> None:
    wanted = len(made.tensors) + region_op.outputs(made.reference)
    if len(names) != wanted:
        raise RegionError(
            f"the C++ generator of region {made.name} takes {len(names)} operands",
            expected=f"{wanted}: the inputs, then the outputs; `threads` and constants behind `*`",
            got=", ".join(names),
        )


def _place(made: Region) -> str:
    return f"{made.reference.__module__}.{made.reference.__qualname__}"
