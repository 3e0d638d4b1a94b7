"""Compiles a kernel for a GPU that is not there, and reads what came out: resources, and the instruction mix."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.jit import JITFunction

from recompile.lowering.lookup.triton_module import load

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
# What an instruction does, by its name in SASS or on AMD; an asynchronous copy is a load as well.
_KINDS = {
    "matrix": r"[HIQDO]G?MMA\b|UTC\w*MMA|v_s?mf",
    "load": r"LDG\b|LDGSTS\b|global_load|buffer_load",
    "atomics": r"REDG?\b|ATOMG?\b|(global|buffer)_atomic",
    "barriers": r"BAR\b|SYNCS\b|s_barrier",
    "copies": r"LDGSTS\b|UTMALDG\b|UBLKCP\b|(global|buffer)_load_lds",
    "special": r"MUFU\b|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
}
_WIDE = r"\.(128|256)\b|dwordx4"
# Of a multiprocessor, or a compute unit: 32-bit registers and warps that can be held, shared memory in bytes.
_NVIDIA = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


def compiled(launch: Any, target: GPUTarget) -> Any:
    """The launch's kernel with its default schedule, and the options that Inductor compiles it with."""
    kernel, config = _kernel(launch)
    values = launch.arguments
    types = {name: POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "i32" for name, x in values.items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (k,) for k, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    source = ASTSource(kernel, signature, {places[k]: x for k, x in config.kwargs.items()}, aligned)
    shape = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options={"debug": True, "sanitize_overflow": False, **shape})


def _kernel(launch: Any) -> tuple[Any, Config]:
    module = load(launch.source)
    for made in vars(module).values():
        function = made.fn if isinstance(made, Autotuner) else made
        if isinstance(function, JITFunction):
            # Device asserts hold the file's path, and AMD's code that walks over it depends on its length.
            function.fn.__code__ = function.fn.__code__.replace(co_filename="kernel.py")
    kernel: Any = getattr(module, launch.name)
    return (kernel.fn, kernel.configs[0]) if isinstance(kernel, Autotuner) else (kernel, Config({}))


def measured(launch: Any, name: str) -> dict[str, int]:
    """What the kernel needs on the target `name`, and how many instructions of each kind it has.

    `spilled`: bytes that a thread keeps in memory for want of registers. AMD's scalar registers may overflow into
    lanes of vector registers, which touches no memory, and is not counted. `occupancy`: percent of the warps that can
    be held, by registers, shared memory and warps alone.
    """
    binary = compiled(launch, TARGETS[name])
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    if name in _NVIDIA:
        (registers, spilled), instructions = _sass(binary.asm["cubin"])
        held = _nvidia(registers, shared, warps, _NVIDIA[name]) / 64
    else:
        text = binary.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{field}:\s*(\d+)", text)[0])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
        instructions = re.findall(r"^\t([a-z]\w+.*?)(?:\s*;.*)?$", text, re.M)
        held = _amd(registers, shared, warps) / 32
    resources = {"warps": warps, "registers": registers, "shared": shared, "spilled": spilled}
    return resources | {"occupancy": round(100 * held)} | _mix(instructions)


def _sass(cubin: bytes) -> tuple[tuple[int, int], list[str]]:
    """((registers, bytes on the stack and in local memory), the instructions)"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, text = (_cuobjdump(option, path) for option in ("-res-usage", "-sass"))
    ((registers, *spilled),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    return (int(registers), sum(map(int, spilled))), re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?(.*?)\s*;", text, re.M
    )


def _cuobjdump(option: str, path: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _mix(instructions: list[str]) -> dict[str, int]:
    found = Counter(kind for text in instructions for kind in _kinds(text))
    counted = ("matrix", "wide_loads", "narrow_loads", "copies", "atomics", "barriers", "special", "total")
    return {kind: found[kind] for kind in counted}


def _kinds(text: str) -> Iterator[str]:
    if re.match(r"NOP|s_nop", text):
        return
    yield "total"
    for kind, pattern in _KINDS.items():
        if re.match(pattern, text):
            yield kind if kind != "load" else "wide_loads" if re.search(_WIDE, text) else "narrow_loads"


def _nvidia(registers: int, shared: int, warps: int, memory: int) -> int:
    """Warps a multiprocessor holds: 64 Ki registers, given to warps in units of 256 and to four schedulers; 1 KiB of a
    block's shared memory is the driver's."""
    by_registers = 65536 // (_up(registers * 32, 256)) // 4 * 4
    return min(by_registers // warps, memory // (_up(shared, 128) + 1024), 64 // warps, 32) * warps


def _amd(registers: int, shared: int, warps: int) -> int:
    """Waves a compute unit holds: four SIMDs with 512 vector registers a lane each, and 64 KiB of memory."""
    by_registers = min(512 // _up(registers, 8), 8) * 4
    return min(by_registers // warps, 64 * 1024 // shared if shared else 32) * warps


def _up(n: int, unit: int) -> int:
    return -(-max(n, 1) // unit) * unit
