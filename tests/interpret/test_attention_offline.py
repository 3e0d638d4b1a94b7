"""What Inductor gets of an attention on a GPU, and its schedules; `test_offline_table.py` compiles the kernels."""

import os

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.attention import Attention, op

triton = pytest.importorskip("triton")
from benchmarks.offline.compiling import TARGETS  # noqa: E402
from recompile.lowering.attention import triton_schedule  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)


class Hopper:
    """A driver that only says what it would drive: enough to find out what a kernel writes."""

    def get_current_target(self):
        return TARGETS["sm_90"]


def unlaunched(*, kwargs, tensors_to_clone, **_):
    """What a launch returns, without one."""
    return {name: kwargs[name].clone() for name in tensors_to_clone}


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_inductor_gets_are_three_kernels_that_write_only_their_outputs(dynamic, monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    found = []

    def keep(gm, example_inputs):
        for node in gm.graph.nodes:
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                found.append(dict(node.kwargs))
                node.target = unlaunched
        gm.recompile()
        return gm.forward

    attention = op.op_for("cuda")
    score = "s + T0(j - i + M - 1) + x0"
    spec = Attention(f"where(j <= i, {score}, -1.0e9)", True, ("T0", "x0"), "j <= i", score, -9.9e8)
    text = str(spec)
    q, k, v = (torch.randn(3, 2, 40, 16, requires_grad=True) for _ in range(3))
    extras = [torch.randn(1, 2, 79, requires_grad=True), torch.randn(3, 1, 1, 40)]
    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(lambda *args: attention(*args, text)[0], backend=compiler, dynamic=dynamic)
    compiled(q, k, v, extras).sum().backward()
    written = [sorted(x["tensors_to_clone"]) for x in found]
    assert written == [["lse_ptr", "out_ptr"], ["dT0_ptr", "dq_ptr"], ["dk_ptr", "dv_ptr"]]
    assert all(("M" in x["kwargs"]) == dynamic for x in found)


def test_a_tuner_is_offered_neighbours(monkeypatch):
    assert len(triton_schedule.choose("forward", torch.bfloat16, 64, False, 500, 500)) == 1
    monkeypatch.setenv("RECOMPILE_AUTOTUNE", "1")
    assert len(triton_schedule.choose("forward", torch.bfloat16, 64, False, 500, 500)) == 6
    assert (
        len(triton_schedule.choose("forward", torch.bfloat16, 64, False, 10, 10)) < 6
    )  # not beyond what there is


def test_a_device_without_kernels_has_no_op():
    assert op.op_for("meta") is None
