"""The Triton lookups as the compiler sees them, without a GPU: which op a pass emits, and what Inductor gets."""

import operator

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.lookup import Bag, Lookup, Output, Table, op
from recompile.options import Options
from recompile.passes.fuse_lookups import FuseLookups
from recompile.passes.pool_sequences import PoolSequences
from recompile.rewrite import Context

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

SPEC = Lookup(
    (Table("a", 16), Table("b", 16), Table("c", 16)),
    (Bag(0, (0,)), Bag(1, (1,)), Bag(2, (2,), "sum", keep="Ne(x0, 0)", divisor="Max(1, count)")),
    (Output("concat", (0, 1, 2, ~3)), Output("sum", (0, 1), 16)),
)


class Hopper:
    """A driver that only says what it would drive: enough to find out what a kernel writes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())


def unlaunched(*, kwargs, tensors_to_clone, **_):
    """What a launch returns, without one."""
    return {name: kwargs[name].clone() for name in tensors_to_clone}


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_kernel_forward_and_one_backward_that_write_only_their_outputs(hopper, dynamic):
    """Else functionalization would copy every table."""
    launches = []

    def keep(gm, example_inputs):
        for node in gm.graph.nodes:
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                launches.append(dict(node.kwargs))
                node.target = unlaunched
        gm.recompile()
        return gm.forward

    lookup, text = op.op_for("cuda"), str(SPEC)
    weights = [torch.randn(30, 16, requires_grad=True) for _ in range(3)]
    sources = [torch.zeros(6, dtype=torch.int64) for _ in range(2)]
    sources += [torch.zeros(6, 5, dtype=torch.int64), torch.randn(6, 3)]
    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(lambda w, s: lookup(w, s, text), backend=compiler, dynamic=dynamic)
    rows, total = compiled(weights, sources)
    (rows.sum() + total.sum()).backward()
    assert [sorted(x["tensors_to_clone"]) for x in launches] == [["out0"], ["into0", "into1", "into2"]]
    assert all(isinstance(x["kwargs"]["B"], fx.Node) == dynamic for x in launches)


def fields(a, b, x, y, seq):
    mask = (seq != 0).unsqueeze(-1).float()
    pooled = (torch.nn.functional.embedding(seq, a) * mask).sum(1)
    rows = [torch.nn.functional.embedding(x, a), torch.nn.functional.embedding(y, b)]
    return torch.cat([*rows, pooled], 1)


def rewritten(device, learn=False):
    """The lookups that are left of `fields`."""
    with FakeTensorMode():
        tables = [torch.empty(30, 8, device=device) for _ in range(2)]
        ids = [torch.empty(6, device=device, dtype=torch.int64) for _ in range(2)]
        gm = make_fx(fields, pre_dispatch=True)(
            *tables, *ids, torch.empty(6, 5, device=device, dtype=torch.int64)
        )
    for table in gm.graph.find_nodes(op="placeholder")[:2]:
        table.meta["val"].requires_grad_(learn)
    for rewrite in (PoolSequences(), FuseLookups()):
        rewrite.run(gm.graph, Context(Options()))
    return [n for n in gm.graph.nodes if op.is_lookup(n.target) and n.users]


@pytest.mark.parametrize("device, expected", [("cuda", "lookup_triton"), ("cpu", "lookup")])
def test_passes_emit_the_op_of_the_tables_device(device, expected):
    found = rewritten(device)
    assert [n.target.name() for n in found] == [f"recompile::{expected}"]
    assert len(Lookup.parse(found[0].args[2]).bags) == 3
    assert [u.target for u in found[0].users] == [operator.getitem]


def test_gradients_that_are_added_in_any_order_are_left_to_pytorch_where_that_is_asked_for():
    torch.use_deterministic_algorithms(True)
    try:
        left = {
            (device, learn): len(rewritten(device, learn))
            for device in ("cpu", "cuda")
            for learn in (False, True)
        }
    finally:
        torch.use_deterministic_algorithms(False)
    assert left == {("cpu", False): 1, ("cpu", True): 1, ("cuda", False): 1, ("cuda", True): 0}


def test_a_device_without_kernels_is_refused():
    assert op.op_for("meta") is None
