"""gcc makes vectors of every loop over pairs: one that it does not understand is several times slower."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.graph import GraphLowering

import recompile.lowering.attention  # noqa: F401  (registers the op)
from recompile.torch_private.generated_code import Kernel, kernels
from tests.cpu.test_attention_kernel import SPECS, extras, inputs

ROOTS = (
    "T0(trunc(atmost(atleast(sqrt(div(1.0*Abs(n0 - n1), 60)), 0), 16)))"  # NaN is out of range: it is checked
)
SECONDS = "Max(1, Abs(n0 - n1))"
ROUNDED = f"T0(Min(16, Max(0, trunc(floor(log2({SECONDS})) - nearest(log10({SECONDS}))))))"
MORE = {
    "roots": f"Attention(score='where(j <= i, sigmoid(s + {ROOTS}), 0)', softmax=False, extras=('T0', 'n0', 'n1'), "
    f"keep='j <= i', kept='sigmoid(s + {ROOTS})')",
    "rounded": f"Attention(score='s + {ROUNDED}', softmax=True, extras=('T0', 'n0', 'n1'))",
    "clamped": "Attention(score='s + T0(Min(16, Abs(n0 - n1)))', softmax=True, extras=('T0', 'n0', 'n1'))",
}


def given(name: str, rows: int) -> list[Tensor]:
    if name not in MORE:
        return extras(name, 2, 2, rows, rows)
    stamps = torch.randint(0, 10**5, (2, 1, rows, 1))
    return [torch.randn(1, 2, 17), stamps, stamps.mT.contiguous()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="asks gcc what it did")
@pytest.mark.parametrize("name", ["hstu", "gathered", "t5", "documents", "dropout", "lengths", *MORE])
def test_loops_are_vectors(name: str, tmp_path: Path) -> None:
    q, k, v = inputs(2, 2, 70, 70, 16, 16)
    spec, more = MORE.get(name) or str(SPECS[name]), given(name, 70)
    ops = torch.ops.recompile
    out, lse = ops.attention(q, k, v, more, spec)
    found = _kernels(lambda *x: ops.attention(*x, more, spec), q, k, v)
    found += _kernels(
        lambda *x: ops.attention_backward(*x, more, out, lse, spec, []), torch.ones_like(v), q, k, v
    )
    assert [kernel.op for kernel in found] == ["attention", "attention_backward"]
    for kernel in found:
        assert _scalar_loops(kernel.source, tmp_path) == []


class Written(Exception):
    """Inductor has written a program, which is not to be compiled: gcc compiles its kernels below."""


def _kernels(function: Callable[..., object], *args: Tensor) -> list[Kernel]:
    """The kernels of ours in the program of a function."""

    def stop(program: str) -> None:
        programs.append(program)
        raise Written

    programs: list[str] = []
    torch._dynamo.reset()
    with (
        patch.object(GraphLowering, "save_output_code", stop),
        torch._inductor.config.patch(force_disable_caches=True),
        torch.no_grad(),
        pytest.raises(Exception, match="Written"),
    ):
        torch.compile(function, dynamic=False)(*args)
    return [kernel for program in programs for kernel in kernels(program)]


def _scalar_loops(source: str, folder: Path) -> list[str]:
    """The functions with an `omp simd` loop over pairs of which gcc makes no vectors; not those that nothing calls."""
    path, notes = folder / "kernel.cpp", folder / "notes.txt"
    path.write_text(source)
    notes.unlink(missing_ok=True)
    options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=False)
    built = CppBuilder(name="kernel", sources=str(path), output_dir=str(folder), BuildOption=options)
    command = [word for word in shlex.split(built.get_command_line()) if word != "-shared"]
    command[command.index("-o") + 1] = str(folder / "kernel.o")
    report = f"-fopt-info-vec-optimized={notes}"
    subprocess.run([*command, "-c", report], check=True, capture_output=True)
    done = {int(line) for line in re.findall(r"kernel\.cpp:(\d+):\d+: optimized: loop", notes.read_text())}
    lines = ["", *source.splitlines()]
    scalar = []
    for n, line in enumerate(lines):
        if "omp simd" not in line or not lines[n + 1].endswith("{"):
            continue
        headers = (re.match(r" *(?:inline|void) .*?(\w+)\(", above) for above in reversed(lines[:n]))
        name = next(header[1] for header in headers if header)
        body = next(k for k in range(n, len(lines)) if re.match(r" *}", lines[k]))
        called = len(re.findall(rf"\b{name}\(", source)) > 1
        if called and not done & {*range(n + 1, body + 1)}:
            scalar.append(name)
    return scalar
