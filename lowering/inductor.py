"""Our door into Inductor's IR (private API; tried with torch 2.11.0 and 2.13.0): nodes that are C++ kernels of ours.

The kernel is defined in the generated program beside Inductor's own kernels and called with raw pointers, so no
Python and no dispatcher stand between. Outputs are empty buffers that the node is declared to mutate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.codegen.common import KernelArgs
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index
from torch._inductor.lowering import empty_strided
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

from recompile.lowering.fingerprint import digest
from recompile.lowering.lookup.cpp_common import Operand

Render = Callable[[Sequence[Operand], Sequence[Operand], int], tuple[str, str]]

_HEADER = """#include <torch/csrc/inductor/cpp_prefix.h>
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
// A kernel's first lines fill tables of pointers, which is not worth optimizing: for 800 tables g++ 12 takes 11 s with
// -O3 and 5 s without, 3 s of them over the headers. What it does with them belongs into other functions, or lambdas.
#if defined(__GNUC__) && !defined(__clang__)
#define RECOMPILE_ENTRY __attribute__((optimize("O0")))
#else
#define RECOMPILE_ENTRY
#endif
"""


def realize(x: Any) -> Any:
    """`x` as a buffer, or a view of one, with a settled layout."""
    node = ir.ExternKernel.realize_input(x)
    if not isinstance(node.get_layout(), ir.NonOwningLayout | ir.FixedLayout):
        node.freeze_layout()
    return node


def dense_rows(x: Any) -> Any:
    """`x` itself where the elements of its last dim lie side by side, else a contiguous copy of it."""
    node = realize(x)
    layout = node.get_layout()
    known = V.graph.sizevars.statically_known_equals
    if not layout.size or known(layout.stride[-1], 1) or known(layout.size[-1], 1):
        return x
    return ir.ExternKernel.copy_input(node)


def empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A contiguous buffer for a kernel to fill."""
    return empty_strided(list(size), None, dtype=dtype, device=device)


class CppRegion(ir.ExternKernel):
    """Calls a C++ kernel that `render` writes: `(inputs, outputs, threads) -> (functions, body)`.

    Args:
        title: the operator without its namespace; the kernel is named after it.
        spec: the operator's spec; its digest in the source tells which region a kernel is of.
    """

    def __init__(
        self, title: str, spec: str, inputs: Sequence[Any], outputs: Sequence[Any], render: Render
    ) -> None:
        buffers = [realize(x) for x in inputs]
        targets = [realize(x) for x in outputs]
        nodes: list[Any] = list(self.unwrap_storage([*buffers, *targets]))
        device = outputs[0].get_device()
        super().__init__(None, ir.NoneLayout(device=device), nodes)
        self.title, self.spec, self.render = title, spec, render
        self.n_inputs, self.device = len(inputs), device
        self.mutation_outputs = [
            ir.MutationOutput(ir.NoneLayout(device=device), node, self) for node in nodes[len(inputs) :]
        ]
        for node in nodes[len(inputs) :]:
            V.graph.mark_buffer_mutated(node.get_name())
        self.name = V.graph.register_buffer(self)
        V.graph.register_operation(self)

    def should_allocate(self) -> bool:
        return False

    def has_side_effects(self) -> bool:
        return False

    def get_outputs(self) -> list[Any]:
        return list(self.mutation_outputs)

    def get_unbacked_symbol_defs(self) -> Any:
        return type(super().get_unbacked_symbol_defs())()

    def codegen(self, wrapper: Any) -> None:
        """Writes the kernel's definition and its call into the program."""
        args = KernelArgs()
        operands = [_operand(x, args, output=k >= self.n_inputs) for k, x in enumerate(self.inputs)]
        functions, body = self.render(
            operands[: self.n_inputs], operands[self.n_inputs :], parallel_num_threads()
        )
        definitions, call_args, types = args.cpp_argdefs()
        name = f"cpp_{self.title}_{wrapper.next_kernel_suffix()}"
        entry = name if V.graph.cpp_wrapper else "kernel"
        signature = f'extern "C" void {entry}({", ".join(definitions)})'
        include, guard = _profiled(f"recompile::{self.title} graph_{V.graph.graph_id} {name}")
        # With `cpp_wrapper` all kernels of a graph are one file: what each defines has a namespace of its own.
        space = f"of_{entry}"
        inner = f"namespace {{\nnamespace {space} {{\n{functions}\n}}  // namespace {space}\n}}  // namespace"
        kernel = f"RECOMPILE_ENTRY\n{signature} {{\n  using namespace {space};{guard}{body}\n}}\n"
        first = f"// recompile::{self.title}, spec {digest(self.spec)}\n{include}"
        source = f"{first}{_HEADER}\n{inner}\n\n{kernel}"
        if not V.graph.cpp_wrapper:
            source = f"async_compile.cpp_pybinding({types!r}, r'''\n{source}''')"
        wrapper.define_kernel(name, source, gpu=False, cpp_definition=f"{signature};\n")
        wrapper.generate_kernel_call(name, call_args, device=self.device, triton=False, arg_types=types)


def _profiled(name: str) -> tuple[str, str]:
    """(include, statement) that show a kernel to the profiler by this name, under `cpp.enable_kernel_profile`."""
    if not config.cpp.enable_kernel_profile:
        return "", ""
    handle = f'torch::aot_inductor::RAIIAtenRecordFunctionHandle record("{name}", nullptr);'
    return "#include <torch/csrc/inductor/aoti_runtime/utils.h>\n", f"\n  {handle}"


def _operand(node: Any, args: KernelArgs, output: bool) -> Operand:
    layout = node.get_layout()
    name = (args.output if output else args.input)(node.get_name())
    offset = _expression(layout.offset, args)
    return Operand(
        pointer=name if offset == "0" else f"({name} + {offset})",
        ctype=DTYPE_TO_CPP[layout.dtype],
        sizes=tuple(_expression(s, args) for s in layout.size),
        strides=tuple(_expression(s, args) for s in layout.stride),
    )


def _expression(value: Any, args: KernelArgs) -> str:
    expr = V.graph.sizevars.simplify(sympy.sympify(value))
    if expr.is_Integer:
        return str(int(expr))
    names = {s: sympy.Symbol(args.size(s), integer=True) for s in expr.free_symbols}
    return str(cexpr_index(expr.subs(names)))  # type: ignore[no-untyped-call]
