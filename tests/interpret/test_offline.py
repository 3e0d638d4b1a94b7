"""Every class of Triton kernel compiles, without a GPU, for NVIDIA and AMD; no thread runs out of registers."""

import os
import re
import subprocess

import pytest
import torch

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.lookup import Bag, Lookup, Output, Table, op, triton_backward, triton_forward
from recompile.lowering.lookup.triton_module import load

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
B = 300


def ids(*size, dtype=torch.int64):
    return torch.zeros(size, dtype=dtype)


def one_bag(dim, dtype, sources, bag):
    outputs = (Output("concat", (0,)),)
    return [torch.zeros(1000, dim, dtype=dtype)], sources, Lookup((Table("t", dim),), (bag,), outputs)


def many(dtype):
    """26 one-hot fields, dense features and two sums: the select chains, copies and places of a real model."""
    weights = [torch.zeros(1000 + t, 16, dtype=dtype) for t in range(26)]
    sources = [ids(B, 26)[:, t] for t in range(26)] + [torch.zeros(B, 13, dtype=dtype)]
    fields = tuple(range(26))
    outputs = (
        Output("concat", (*fields, ~26)),
        Output("sum", fields, 16),
        Output("sum_of_squares", fields, 16),
    )
    bags = tuple(Bag(t, (t,), row="Mod(x0 + 7, 1000)") for t in fields)
    return weights, sources, Lookup(tuple(Table(f"t{t}", 16) for t in fields), bags, outputs)


def scalars():
    """One of each scalar operation, on a loaded mask and float ids."""
    keep = "Ne(x1, 0) & ~((l >= Max(x2, 2)) | Eq(Min(x0, 5), 3))"
    bags = (
        Bag(0, (0, 1, 2), "sum", row="Mod(x0 - 5, 1000)", keep=keep, divisor="Max(1, count)/L"),
        Bag(0, (3,), row="trunc(x0)"),
    )
    sources = [ids(B, 5), torch.zeros(B, 5, dtype=torch.bool), ids(B, 1), torch.zeros(B)]
    return [torch.zeros(1000, 8)], sources, Lookup((Table("t", 8),), bags, (Output("concat", (0, 1)),))


JAGGED = [ids(4000), ids(B)]
GROUPS = {
    "one-hot narrow": one_bag(16, torch.float32, [ids(B)], Bag(0, (0,))),
    "one-hot odd": one_bag(25, torch.float16, [ids(B, dtype=torch.int32)], Bag(0, (0,))),
    "one-hot wide": one_bag(1536, torch.bfloat16, [ids(B)], Bag(0, (0,))),
    "rows side by side": one_bag(8, torch.float32, [ids(B, 5)], Bag(0, (0,))),
    "pooled short": one_bag(
        64, torch.float32, [ids(B, 20)], Bag(0, (0,), "sum", keep="Ne(x0, 0)", divisor="Max(1, count)")
    ),
    "pooled long": one_bag(
        16, torch.float16, [ids(B, 200)], Bag(0, (0,), "sum", count="nonzero", divisor="count")
    ),
    "pooled double": one_bag(32, torch.float64, [ids(B, 20)], Bag(0, (0,), "sum", divisor="L")),
    "jagged": one_bag(64, torch.float32, JAGGED, Bag(0, (0,), "sum", offsets=1)),
    "jagged weighted": one_bag(
        16, torch.float32, [*JAGGED, torch.zeros(4000)], Bag(0, (0, 2), "sum", weight="x1", offsets=1)
    ),
    "jagged max": one_bag(64, torch.float32, JAGGED, Bag(0, (0,), "max", offsets=1)),
    "long max": one_bag(128, torch.bfloat16, [ids(B, 50)], Bag(0, (0,), "max")),
    "scalars": scalars(),
    "26 fields": many(torch.float32),
}


def launches(weights, sources, spec):
    """The forward and backward kernels of a group."""
    outs = op.fake(weights, sources, str(spec))
    places, scratch = triton_forward.find_places(spec, sources)
    buffers = dict(enumerate(outs)) | {-1: torch.zeros(B, scratch)}
    yield from triton_forward.launches(spec, weights, sources, buffers, places, B)
    rows = {
        t: torch.zeros_like(w, dtype=w.dtype if w.dtype == torch.double else torch.float)
        for t, w in enumerate(weights)
    }
    weighted = {bag.loads[1]: torch.zeros_like(sources[bag.loads[1]]) for bag in spec.bags if bag.weight}
    yield from triton_backward.launches(spec, outs, weights, sources, rows, weighted, B)


def compiled(launch, target):
    """The launch's kernel, with the options that Inductor compiles it with."""
    values = launch.arguments
    signature = {k: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else "i32" for k, v in values.items()}
    aligned = {
        (k,): [["tt.divisibility", 16]] for k, v in enumerate(values.values()) if isinstance(v, torch.Tensor)
    }
    source = ASTSource(getattr(load(launch.source), launch.name), signature, {}, aligned)
    return triton.compile(source, target=target, options={"debug": True, "sanitize_overflow": False})


def spills(binary, target, folder):
    """Bytes that a thread keeps in memory for want of registers.

    AMD's scalar registers may overflow into lanes of vector registers (35 do, for 26 tables): no memory is touched.
    """
    if target.backend == "hip":
        return sum(map(int, re.findall(r"\.private_segment_fixed_size:\s*(\d+)", binary.asm["amdgcn"])))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return sum(int(n) for pair in found for n in pair)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.arch))
@pytest.mark.parametrize("name", GROUPS)
def test_every_class_compiles_without_spills(name, target, tmp_path):
    for launch in launches(*GROUPS[name]):
        assert spills(compiled(launch, target), target, tmp_path) == 0, launch.name


@pytest.mark.parametrize("name", ["one-hot narrow", "one-hot wide", "pooled short", "jagged", "26 fields"])
def test_rows_are_read_16_bytes_at_a_time(name):
    forward = next(iter(launches(*GROUPS[name])))
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled(forward, TARGETS[1]).asm["ptx"])
