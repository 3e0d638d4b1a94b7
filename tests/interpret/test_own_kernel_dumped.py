"""A Triton kernel that a model launches itself, in a dump: its source, and the lines that launch it."""

import json

import pytest
import torch

from recompile import capture
from recompile.dump_graph import files
from recompile.recording import Recording
from recompile.report import GraphRecord

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402


class Hopper:
    """A driver that only says what it would drive: enough to trace a launch."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128)], key=["n"])
@triton.jit
def tripled_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 3 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def shifted_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 3 + tl.load(x + at, mask=at < n), mask=at < n)


def model(x):
    a, b, c = (torch.empty_like(x) for _ in range(3))
    tripled_kernel[(4,)](x, a, x.numel())
    shifted_kernel[(4,)](a, b, x.numel(), BLOCK=64)
    shifted_kernel[(4,)](b, c, x.numel(), BLOCK=64)
    return c.relu()


def recorded(monkeypatch):
    """The files of the dump of `model`, as the compiler sees it on a GPU."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    torch._dynamo.reset()
    recording = Recording(GraphRecord(), "", strict=True)

    def backend(gm, inputs):
        captured = capture.capture(gm).gm
        recording.begin(captured, 0.0)
        recording.end(captured, [])
        return lambda *args: (args[0],)

    torch.compile(model, backend=backend)(torch.randn(50))
    return files(recording, 0)


def test_the_source_of_each_kernel_is_kept_once(monkeypatch):
    made = recorded(monkeypatch)
    kernels = {name: text for name, text in made.items() if name.startswith("kernels/")}
    assert sorted(kernels) == ["kernels/your-shifted_kernel.py", "kernels/your-tripled_kernel.py"]
    shifted = kernels["kernels/your-shifted_kernel.py"]
    assert "3 + tl.load(x + at" in shifted and "shifted_kernel[(4,)](b, c," in shifted
    assert "@triton.jit" in kernels["kernels/your-tripled_kernel.py"]
    nodes = json.loads(made["graph.json"])["nodes"]
    assert sorted(node["kernel"] for node in nodes if node["kernel"]) == sorted([*kernels, *[*kernels][1:]])


def test_a_kernel_without_source_is_left_out(monkeypatch):
    monkeypatch.setattr("inspect.getsource", lambda _: (_ for _ in ()).throw(OSError))
    assert not [name for name in recorded(monkeypatch) if name.startswith("kernels/")]
