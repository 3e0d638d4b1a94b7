"""Every kernel compiles, without a GPU, for NVIDIA and AMD, and is as benchmarks/results/offline.json has it.

The texts of all kernels are compared, and what each becomes on one of the targets: all four take minutes. After a
change of kernels or schedules, `python -m benchmarks.offline` writes the table anew.
"""

import functools
import os

import pytest

import recompile.lowering  # noqa: F401  (registers the ops)

triton = pytest.importorskip("triton")
from benchmarks.offline import table  # noqa: E402
from benchmarks.offline.compiling import TARGETS, compiled, measured  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton was imported to interpret, not to compile", allow_module_level=True)

COMMON = 64 * 1024  # bytes of shared memory that a program can have on each of the targets


@functools.cache
def kept():
    """The rows of the table."""
    version, rows = table.read()
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    return rows


def test_the_table_has_the_kernels_of_today():
    texts = {kernel: table.digest(x) for case in table.CASES for kernel, x in table.launches(case).items()}
    found = {(kernel, target): text for kernel, text in texts.items() for target in TARGETS}
    assert found == {key: row["text"] for key, row in kept().items()}, "run `python -m benchmarks.offline`"


def sampled(case):
    """The rows of a case, each kernel on another target."""
    first = table.CASES.index(case)
    for k, (kernel, launch) in enumerate(table.launches(case).items()):
        yield table.row(kernel, launch, [*TARGETS][(first + k) % len(TARGETS)])


@pytest.mark.parametrize("case", table.CASES)
def test_a_case_compiles_without_spills_to_what_the_table_says(case):
    rows = list(sampled(case))
    assert all(row["spilled"] == 0 and row["shared"] <= COMMON for row in rows), rows
    for row in rows:
        assert row == kept()[row["kernel"], row["target"]], "run `python -m benchmarks.offline`"


def test_no_kernel_of_the_table_spills_or_takes_more_shared_memory_than_there_is():
    assert not [key for key, row in kept().items() if row["spilled"] or row["shared"] > COMMON]


def wide(kernel):
    """Whether rows are of a multiple of 16 bytes."""
    return " x 25" not in kernel


def test_rows_are_read_16_bytes_at_a_time():
    forward = [k for k in kept() if k[0].endswith("forward") and wide(k[0])]
    assert not [key for key in forward if not kept()[key]["wide_loads"]]


def test_matrix_units_are_used():
    halves = [k for k in kept() if k[0].startswith("attention") and "p32" not in k[0]]
    assert not [key for key in halves if not kept()[key]["matrix"]]


@pytest.mark.parametrize("target, name", [("sm_90", "wgmma"), ("sm_100", "tcgen05.mma")])
def test_the_newest_matrix_instructions_are_used(target, name):
    forward = next(iter(table.launches("attention: causal, bf16 x 64").values()))
    assert name in compiled(forward, TARGETS[target]).asm["ptx"]


def test_what_is_counted():
    forward, *_, keys = table.launches("attention: causal, bf16 x 64").values()
    found = measured(forward, "sm_80")
    assert found["warps"] == 4 and found["occupancy"] in range(1, 101) and found["copies"] > 0
    assert found["total"] > found["matrix"] + found["wide_loads"] + found["special"]
    assert measured(keys, "gfx942")["copies"] == 0
