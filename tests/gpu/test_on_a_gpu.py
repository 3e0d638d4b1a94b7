"""What only a GPU can show: skipped where there is none. Models, inputs and checks are tried on the CPU.

compute-sanitizer --tool memcheck python -m pytest tests/gpu -k equal -p no:xdist     # every access in bounds
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recompile.report import collect

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
WAYS = [("cpu", True), *(pytest.param("cuda", train, marks=GPU) for train in (False, True))]
BAD_ID = """
import torch
from tests.gpu.test_on_a_gpu import Fields, batch
model = torch.compile(Fields().cuda(), backend="recompile")
ids, history, dense = (x.cuda() for x in batch(64))
ids[3, 1] = 2000
model(ids, history, dense)
torch.cuda.synchronize()
"""


class Fields(nn.Module):
    """Fields and a pooled history, the fields' interactions, and attention over the history with a bias by position."""

    def __init__(self, fields=5, length=40, width=32):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(1000, width) for _ in range(fields))
        self.bag, self.items = nn.EmbeddingBag(1000, width, mode="mean"), nn.Embedding(1000, width)
        self.project, self.bias = nn.Linear(width, 3 * width), nn.Parameter(torch.randn(2 * length - 1))
        self.top = nn.Linear((fields + 2) * width + 3, 1)
        place = torch.arange(length)
        self.register_buffer("apart", place - place[:, None] + length - 1)

    def forward(self, ids, history, dense):
        fields = [table(ids[:, k]) for k, table in enumerate(self.tables)]
        q, k, v = self.project(self.items(history)).chunk(3, -1)
        weights = F.silu(q @ k.mT + self.bias[self.apart]).tril() / history.shape[1]
        return self.top(torch.cat([*fields, self.bag(history), (weights @ v).mean(1), dense], 1))


def batch(size):
    return torch.randint(0, 1000, (size, 5)), torch.randint(0, 1000, (size, 40)), torch.rand(size, 3)


def results(model, call, inputs, train):
    with torch.set_grad_enabled(train):
        out = call(*inputs)
    if train:
        out.sum().backward()
    return out, [p.grad for p in model.parameters()]


def check(model, call, inputs, train, within=2e-3):
    """Values, and gradients in training, equal float64 eager's on the same device."""
    exact = copy.deepcopy(model).double()
    wanted = results(exact, exact, [x.double() if x.is_floating_point() else x for x in inputs], train)
    found = results(model, call, inputs, train)
    wanted, found = ([x for x in (out, *grads) if x is not None] for out, grads in (wanted, found))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=within * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("device, train", WAYS)
def test_equal_to_eager(device, train):
    torch._dynamo.reset()
    model = Fields().to(device)
    with collect() as report:
        compiled = torch.compile(model, backend="recompile", options={"strict": True})
        for size in (64, 1, 33) if device == "cuda" else (64,):
            model.zero_grad()
            check(model, compiled, [x.to(device) for x in batch(size)], train)
    assert sorted({region.op.split(".")[1].split("_")[0] for region in report.graphs[0].regions}) == [
        "attention",
        "lookup",
    ]


@GPU
def test_with_cuda_graphs():
    torch._dynamo.reset()
    model = Fields().cuda()
    compiled = torch.compile(model, backend="recompile", mode="reduce-overhead")
    for _ in range(5):  # recorded in the second or third run
        torch.compiler.cudagraph_mark_step_begin()
        check(model, compiled, [x.cuda() for x in batch(64)], train=False)


@GPU
def test_on_another_stream():
    torch._dynamo.reset()
    model, stream = Fields().cuda(), torch.cuda.Stream()
    compiled = torch.compile(model, backend="recompile")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what ran on the default stream would be early
        inputs = [x.cuda(non_blocking=True) for x in batch(64)]
        check(model, compiled, inputs, train=True)
    stream.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_on_the_second_of_two():
    torch._dynamo.reset()
    model = Fields().to("cuda:1")
    check(model, torch.compile(model, backend="recompile"), [x.to("cuda:1") for x in batch(64)], train=True)


@GPU
def test_a_bad_id_is_a_device_assert():
    """It ends the process's use of the device, so it has one of its own."""
    done = subprocess.run([sys.executable, "-c", BAD_ID], capture_output=True, text=True, timeout=300)
    assert done.returncode and "assert" in done.stderr.lower(), done.stderr[-2000:]
