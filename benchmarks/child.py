"""What is measured in a fresh process: compile time, and peak memory. Prints its figure as the last line.

python -m benchmarks.child compile BACKEND TABLES
python -m benchmarks.child memory BACKEND CASE-INDEX
python -m benchmarks.child attention BACKEND LENGTH
"""

from __future__ import annotations

import sys
import time

import torch

from recompile.measure import THREADS, own_peak_mib, reset_peak

from .attention import hstu
from .cases import CASES
from .models.lookups import OneHot


def compile_seconds(backend: str, tables: int) -> float:
    """Wall seconds of the first call of `tables` embeddings, a concatenation and a linear layer, batch 64."""
    model = torch.compile(OneHot(100, tables, out=8), backend=backend)
    ids = torch.randint(0, 100, (64, tables))
    start = time.perf_counter()
    with torch.no_grad():
        model(ids)
    return time.perf_counter() - start


def peak_mib(backend: str, index: int) -> float:
    """Peak resident memory, in MiB, of compiling and running a case three times."""
    case = CASES[index]
    model, inputs = case.build(case.batch)
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        with torch.set_grad_enabled(case.train):
            output = compiled(*inputs)
        if case.train:
            output.sum().backward()
    return own_peak_mib()


def attention_mib(backend: str, length: int) -> float:
    """What a forward of HSTU's attention (batch 1, 4 heads of 64) needs beyond what is held before it, in MiB."""
    model, inputs = hstu(1, (length, 4, 64))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(*inputs)
        reset_peak()
        before = own_peak_mib()
        compiled(*inputs)
    return own_peak_mib() - before


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    measures = {"compile": compile_seconds, "memory": peak_mib, "attention": attention_mib}
    measure = measures[sys.argv[1]]
    print(measure(sys.argv[2], int(sys.argv[3])))
