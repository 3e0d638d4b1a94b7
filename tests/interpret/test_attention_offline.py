"""Every attention kernel compiles, without a GPU, for NVIDIA and AMD; up to a head dim of 128 no register spills."""

import os
import re
import subprocess

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.attention import Attention, op
from recompile.lowering.lookup.triton_module import load

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from recompile.lowering.attention import (  # noqa: E402
    triton_backward,
    triton_forward,
    triton_op,
    triton_schedule,
)
from recompile.lowering.attention.triton_tile import Problem  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)

TARGETS = {str(arch): GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
B, H, M, N = 8, 4, 200, 200


def empty(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


CAUSAL = Attention("where(j <= i, s/8, -1.0e9)", True, (), "j <= i", "s/8", -9.9e8)
BIASED = "(s + T0(Min(Max(trunc(div(log(Max(Abs(n0 - n1), 1)), 0.301)), 0), 32)) + T1(j - i + M - 1))"
HSTU = Attention(
    f"where(j <= i, {BIASED}*sigmoid{BIASED}/N, 0)", False, ("n0", "n1", "T0", "T1"), "j <= i",
    f"{BIASED}*sigmoid{BIASED}/N",
)  # fmt: skip
LOADED = Attention(
    "where(Ne(n0, 0), s/8 + x0, -oo)", True, ("n0", "x0", "n1"), "Ne(n0, 0)", "s/8 + x0",
    weight="where(Eq(n1, 1), 1, 0)",
)  # fmt: skip
EXTRAS = {
    CAUSAL: [],
    HSTU: [
        empty(B, 1, M, 1, dtype=torch.int64), empty(B, 1, 1, N, dtype=torch.int64),
        empty(1, 1, 33), empty(1, H, M + N - 1),
    ],
    LOADED: [empty(B, 1, 1, N, dtype=torch.bool), empty(1, H, M, N), empty(B, 1, 1, N, dtype=torch.int64)],
}  # fmt: skip

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CHOSEN = [
    ("causal", CAUSAL, BF16, 128, "80"),
    ("causal", CAUSAL, F16, 64, "90"),
    ("causal", CAUSAL, BF16, 128, "100"),
    ("causal", CAUSAL, F32, 25, "80"),
    ("causal", CAUSAL, F32, 128, "90"),
    ("causal", CAUSAL, BF16, 64, "gfx942"),
    ("hstu", HSTU, BF16, 64, "80"),
    ("hstu", HSTU, BF16, 128, "90"),
    ("hstu", HSTU, F32, 64, "100"),
    ("hstu", HSTU, F32, 25, "gfx942"),
    ("loaded", LOADED, F16, 128, "80"),
    ("loaded", LOADED, BF16, 32, "90"),
    ("loaded", LOADED, BF16, 25, "100"),
]


def launches(spec, dtype, dim):
    """The forward and backward kernels of a call."""
    q, k, v = (empty(B, H, n, dim, dtype=dtype) for n in (M, N, N))
    extras = tuple(EXTRAS[spec])
    problem = Problem(spec, q, k, v, extras)
    out, lse = triton_op.empty(q, k, v, spec)
    wanted = [e for e, x in enumerate(extras) if x.is_floating_point()]
    yield triton_forward.launch(problem, out, lse)
    buffers = triton_backward.buffers(problem, wanted)
    yield from triton_backward.launches(problem, out, lse, empty(B, H, M), buffers)


def compiled(launch, target):
    """The launch's kernel with its default schedule, and the options that Inductor compiles it with."""
    tuner = getattr(load(launch.source), launch.name)
    config, names, values = tuner.configs[0], tuner.fn.arg_names, launch.arguments
    types = {name: POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "i32" for name, x in values.items()}
    signature = {name: types.get(name, "constexpr") for name in names}
    blocks = {(names.index(name),): size for name, size in config.kwargs.items()}
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if types.get(n, "i32") != "i32"}
    shape = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(tuner.fn, signature, blocks, aligned)
    return triton.compile(source, target=target, options={"debug": True, "sanitize_overflow": False, **shape})


def spills(binary, target, folder):
    """Bytes that a thread keeps in memory for want of registers."""
    if target.backend == "hip":
        return sum(map(int, re.findall(r"\.private_segment_fixed_size:\s*(\d+)", binary.asm["amdgcn"])))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return sum(int(n) for pair in found for n in pair)


@pytest.mark.parametrize(
    "name, spec, dtype, dim, arch", CHOSEN, ids=lambda x: None if isinstance(x, Attention) else str(x)
)
def test_every_kernel_compiles_without_spills(name, spec, dtype, dim, arch, tmp_path):
    target = TARGETS[arch]
    found = list(launches(spec, dtype, dim))
    assert [x.name for x in found] == ["attention", "attention_backward_queries", "attention_backward_keys"]
    for launch in found:
        binary = compiled(launch, target)
        assert spills(binary, target, tmp_path) == 0, launch.name
        assert binary.metadata.shared <= 64 * 1024, launch.name  # what every one of them has


def test_matrix_units_are_used():
    forward = next(iter(launches(CAUSAL, BF16, 64)))
    assert "mma.sync" in compiled(forward, TARGETS["80"]).asm["ptx"]
    assert "wgmma" in compiled(forward, TARGETS["90"]).asm["ptx"]
    assert "mfma" in compiled(forward, TARGETS["gfx942"]).asm["amdgcn"]


class Hopper:
    """A driver that only says what it would drive: enough to find out what a kernel writes."""

    def get_current_target(self):
        return TARGETS["90"]


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
    assert len(triton_schedule.choose("forward", BF16, 64, False, 500, 500)) == 1
    monkeypatch.setenv("RECOMPILE_AUTOTUNE", "1")
    assert len(triton_schedule.choose("forward", BF16, 64, False, 500, 500)) == 6
    assert len(triton_schedule.choose("forward", BF16, 64, False, 10, 10)) < 6  # not beyond what there is


def test_a_device_without_kernels_has_no_op():
    assert op.op_for("meta") is None
