"""Capture keeps the meaning: outputs, gradients, buffers and changed inputs equal eager's."""

from __future__ import annotations

import gc
import operator
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from recompile.capture import capture
from recompile.errors import CaptureError
from recompile.graph.walls import is_wall
from tests.capturing import Backend, check

aten = torch.ops.aten


def x(*shape: int, grad: bool = False) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (torch.randn(batch, *shape, dtype=torch.float64, requires_grad=grad),)


def ids(fields: int, rows: int = 50) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (torch.randint(0, rows, (batch, fields)),)


class Tables(nn.Module):
    def __init__(self, tables: int = 3) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, 4) for _ in range(tables))
        self.top = nn.Linear(4 * tables, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)).sigmoid()


class Scale(torch.autograd.Function):
    """A backward that is not the derivative: lost, it would show."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 100


# The core operators arrive whole.


def test_embeddings_and_linear() -> None:
    backend = check(Tables(), ids(3))
    targets = backend.targets()
    assert {aten.embedding.default, aten.select.int, aten.cat.default, aten.linear.default} <= set(targets)
    assert backend.opaque() == []


@pytest.mark.parametrize(
    "f, op",
    [
        (lambda v: F.softmax(v, -1), aten.softmax.int),
        (lambda v: F.layer_norm(v, (8,)), aten.layer_norm.default),
        (lambda v: F.scaled_dot_product_attention(v, v, v), aten.scaled_dot_product_attention.default),
        (lambda v: torch.matmul(v, v.transpose(-1, -2)), aten.matmul.default),
        (lambda v: torch.einsum("bij,bkj->bik", v, v), aten.einsum.default),
        (lambda v: F.gelu(v) + F.silu(v), aten.gelu.default),
        (lambda v: v.real * 2, aten.mul.Tensor),
    ],
)
def test_core_operators(f: Callable[[Tensor], Tensor], op: Any) -> None:
    backend = check(f, x(3, 8, grad=True))
    assert op in backend.targets() and backend.opaque() == []


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode: str) -> None:
    backend = check(nn.EmbeddingBag(50, 4, mode=mode), ids(5))
    assert aten.embedding_bag.padding_idx in backend.targets() and backend.opaque() == []


def test_every_node_knows_its_module_and_line() -> None:
    backend = check(Tables(), ids(3))
    for node in backend.nodes():
        if node.op == "call_function":
            assert "in forward" in node.meta["stack_trace"] and node.meta["source_fn_stack"]
    linear = next(n for n in backend.nodes() if n.target is aten.linear.default)
    assert any("top" in path for path, _ in linear.meta["nn_module_stack"].values())


# Symbolic shapes.


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_dynamic(dynamic: bool | None) -> None:
    """As many graphs as without capture."""
    batches = (7, 2, 5, 1, 64)
    backend = check(Tables(), ids(3), batches=batches, dynamic=dynamic)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(Tables(), backend=counter, dynamic=dynamic)
    for batch in batches:
        model(*ids(3)(batch))
    assert len(backend.captured) == counter.frame_count


def test_mark_dynamic() -> None:
    torch._dynamo.reset()
    backend = Backend()
    model = torch.compile(lambda v: v.view(-1, 3).sum(0) * v.shape[0], backend=backend)
    for batch in (4, 8, 5):
        value = torch.ones(batch, 6)
        torch._dynamo.mark_dynamic(value, 0)
        assert model(value).tolist() == [2 * batch * batch] * 3
    assert len(backend.captured) == 1


def test_sizes_in_arithmetic() -> None:
    def f(v: Tensor) -> tuple[Tensor, int, Any, Any]:
        n, m = v.shape
        return v.reshape(n * m // 2, 2).sum() / (n + m), n * m, v.new_zeros(max(n, m) + 1), v.numel()

    check(f, lambda batch: (torch.randn(batch, 4, dtype=torch.float64),), batches=(7, 6, 2), dynamic=True)


def test_sizes_that_only_the_operators_know() -> None:
    """F.multi_head_attention_forward multiplies sizes of which Dynamo's graph says nothing."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    backend = check(lambda v: layer(v, v, v), x(5, 8), batches=(7, 6, 3), dynamic=True)
    assert backend.opaque() == []


# Modes, graphs within graphs, effects.


def test_autocast() -> None:
    def f(v: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = v @ w
        return (y.float() + v).sum(1)

    backend = check(f, lambda batch: (torch.randn(batch, 8), torch.randn(8, 8, requires_grad=True)))
    matmul = next(n for n in backend.nodes() if n.target is aten.matmul.default)
    assert matmul.meta["val"].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_no_grad_region() -> None:
    def f(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            weight = v.softmax(1)
            same = v.float() if v.dtype == torch.float32 else v.double()
        return v * weight, same * 2

    backend = check(f, x(4, grad=True), batches=(7,))
    assert backend.targets().count(torch._C._set_grad_enabled) == 2


def test_no_grad_and_inference_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check(Tables().eval(), ids(3))


class Checkpointed(nn.Module):
    """The network inside a checkpoint, which is inside another if it is nested."""

    def __init__(self, between: nn.Module, nested: bool = False, **how: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 4))
        self.nested, self.how = nested, how

    def once(self, v: Tensor) -> Tensor:
        return checkpoint(self.net, v, use_reentrant=False, **self.how) * 2

    def forward(self, v: Tensor) -> Tensor:
        v = v.sin()
        v = checkpoint(self.once, v, use_reentrant=False) if self.nested else self.once(v)
        return v + self.once(v.cos())


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint(nested: bool) -> None:
    backend = check(Checkpointed(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nested), x(4, grad=True))
    assert backend.opaque() == [] and "get_attr" not in {node.op for node in backend.nodes()}
    marked = [node for node in backend.captured[0].gm.graph.nodes if "recompute" in node.meta]
    linear = [node for node in marked if node.target is aten.linear.default]
    assert len(linear) == 4 and not any(
        node.target in (aten.sin.default, aten.cos.default) for node in marked
    )
    regions = [node.meta["ac_graph_id"] for node in linear]
    assert regions[0] == regions[1] < regions[2] == regions[3]
    assert all("'].net" in str(node.meta["nn_module_stack"]) for node in linear)


def test_checkpoints_that_stay() -> None:
    class Halves(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            with torch.no_grad():
                scale = v.abs().amax(1, keepdim=True)
            return v / scale

    backend = check(Checkpointed(Halves()), x(4, grad=True))
    assert "_set_grad_enabled is in it: it switches autocast or grad mode" in backend.opaque()[0]
    saving = partial(create_selective_checkpoint_contexts, [aten.mm.default])
    backend = check(Checkpointed(nn.ReLU(), context_fn=saving), x(4, grad=True))
    assert "higher-order" in backend.opaque()[0]


def test_custom_backward_is_kept() -> None:
    backend = check(lambda v: Scale.apply(v.sin()).cos(), x(4, grad=True))
    assert any("higher-order" in why for why in backend.opaque())


def test_custom_backward_behind_allow_in_graph() -> None:
    @torch._dynamo.allow_in_graph
    def scale(v: Tensor) -> Tensor:
        return Scale.apply(v)

    backend = check(lambda v: scale(v) + 1, x(4, grad=True))
    assert "not torch's" in backend.opaque()[0]


def test_in_place_writes() -> None:
    def f(v: Tensor) -> Tensor:
        y = v.clone()
        y[:, 0] = 3.0
        y[1:].add_(v[:-1])
        y.mul_(2).relu_()
        return y + y.sum()

    backend = check(f, x(4, grad=True))
    mul = next(n for n in backend.nodes() if n.target is aten.mul_.Tensor)
    assert is_wall(mul) and [u.target for u in mul.users] == [aten.relu_.default]
    assert aten.fill_.Tensor in backend.targets() and not backend.opaque()


def test_shape_changed_in_place() -> None:
    """It becomes a view of another name; earlier nodes keep their shape."""

    def f(v: Tensor) -> Tensor:
        y = v * 2
        z = y.add_(1)
        y.unsqueeze_(1).transpose_(0, 1)
        return y.sum(0) + z.mul_(2).squeeze(0)

    backend = check(f, x(4, grad=True), batches=(7,))
    shapes = {n.target: tuple(n.meta["val"].shape) for n in backend.nodes() if n.op == "call_function"}
    assert shapes[aten.add_.Tensor] == (7, 4)
    assert shapes[aten.unsqueeze.default] == (7, 1, 4) and shapes[aten.transpose.int] == (1, 7, 4)


def test_input_mutation() -> None:
    def f(v: Tensor) -> Tensor:
        v.add_(1)
        return v * 2

    check(f, x(4))


def test_batch_norm_statistics() -> None:
    check(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), x(4), batches=(7, 2, 5))


def test_dropout() -> None:
    backend = check(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).train(), x(4))
    assert aten.dropout.default in backend.targets()
    torch._dynamo.reset()
    drop = torch.compile(nn.Dropout(0.3), backend=Backend())
    kept = [(drop(torch.ones(10_000)) > 0).double().mean().item() for _ in range(3)]
    assert all(abs(k - 0.7) < 0.03 for k in kept) and len(set(kept)) > 1


def test_cond() -> None:
    def f(v: Tensor) -> Tensor:
        return torch.cond(v.sum() > 0, lambda t: t.sin(), lambda t: t.cos() * 2, (v,)) + 1

    check(f, x(4))


def test_unbacked_sizes() -> None:
    def f(v: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.nonzero(v[:, 0] > 0).squeeze(1)
        chosen = v[rows]
        return chosen * 2, chosen.sum(0) / (rows.shape[0] + 1)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        backend = check(f, x(4), batches=(7, 20))
    assert any("depends on data" in why for why in backend.opaque())


def test_unbacked_scalars() -> None:
    def f(v: Tensor, n: Tensor) -> Tensor:
        count = n.item()
        torch._check(count >= 0)
        torch._check(count <= v.shape[0])
        return v.narrow(0, 0, count).sum(0) + v.new_zeros(count).sum() * count

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(f, lambda batch: (*x(4)(batch), torch.tensor(1)), batches=(7, 9))


def test_gru() -> None:
    with torch._dynamo.config.patch(allow_rnn=True):
        backend = check(nn.GRU(4, 6, batch_first=True), x(5, 4))
    assert aten.gru.input in backend.targets()


def test_shared_parameters_and_nesting() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Tables(), nn.Sequential(Tables(), nn.Tanh())
            self.b[0].tables = self.a.tables

        def forward(self, ids: Tensor) -> Tensor:
            return self.a(ids) * self.b(ids)

    check(Model(), ids(3))


def test_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    check(layer, x(5, 8), batches=(3, 2))
    with torch.no_grad():  # the fused path
        check(layer.eval(), x(5, 8), batches=(3, 2))


def test_outputs_that_are_no_tensors() -> None:
    backend = check(lambda v: {"a": (v + 1, None), "b": [3, 2.5, v.shape[0]], "c": v}, x(4), dynamic=True)
    assert backend.targets().count(aten.add.Tensor) == len(backend.captured)


def test_views_of_complex_numbers() -> None:
    def f(v: Tensor) -> Tensor:
        z = torch.view_as_complex(v.reshape(v.shape[0], 2, 2))
        return torch.view_as_real(z * z.conj()) + z.imag.sum()

    check(f, x(4, grad=True))


def test_several_results() -> None:
    def f(v: Tensor) -> tuple[Tensor, ...]:
        a, b, _ = v.split([1, 2, 1], 1)
        top = v.topk(2)
        return (a * b, top.values.sum(), *v.unbind(1)[:2])

    backend = check(f, x(4, grad=True))
    assert all(n.users for n in backend.nodes() if n.target is operator.getitem)


def test_constants() -> None:
    backend = check(lambda v: v[:, [0, 2]] * torch.tensor([1.0, 2.0], dtype=torch.float64), x(4, grad=True))
    assert all("tensor constant" in why for why in backend.opaque())
    assert not any(is_wall(n) for n in backend.nodes())


def test_graph_without_operators() -> None:
    check(lambda v: (v, v.shape[0]), x(4))
    torch._dynamo.reset()
    assert torch.compile(lambda: torch.ones(3), backend=Backend())().tolist() == [1, 1, 1]


def test_cast_that_does_nothing_disappears() -> None:
    backend = check(lambda v: v.double().contiguous() + 1, x(4))
    assert {aten.to.dtype, aten.contiguous.default}.isdisjoint(backend.targets())
    assert backend.opaque() == []


@pytest.mark.parametrize("f", [lambda v: torch.zeros_like(v) + v, lambda v: v + torch.arange(4)])
def test_factories(f: Callable[[Tensor], Tensor]) -> None:
    assert check(f, x(4)).opaque() == []


def test_modules_made_in_forward() -> None:
    backend = check(lambda v: nn.Softmax(-1)(v) * torch.FloatTensor([1e-8]), x(4))
    assert torch._C._log_api_usage_once not in backend.targets()
    assert not any(is_wall(n) for n in backend.nodes())


def test_graph_breaks() -> None:
    def f(v: Tensor) -> Tensor:
        y = v.sin()
        torch._dynamo.graph_break()
        return y.cos()

    torch._dynamo.reset()
    backend, value = Backend(), torch.randn(3)
    torch.testing.assert_close(torch.compile(f, backend=backend)(value), f(value))
    assert len(backend.captured) == 2


# Refusals.


def test_refuses_vmap() -> None:
    def f(v: Tensor) -> Tensor:
        return torch.func.vmap(lambda t: t.sin().sum())(v)

    _refuses(f, "the state of a vmap, grad or jvp")


def test_refuses_a_verbatim_result_of_changed_shape() -> None:
    def f(v: Tensor) -> Tensor:
        y = v[:, [0, 1]]
        y.t_()
        return y + 1

    _refuses(f, r"aten.t_.default changes the shape of the result of a verbatim node")


def _refuses(f: Callable[[Tensor], Tensor], sentence: str) -> None:
    torch._dynamo.reset()
    errors: list[CaptureError] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        with pytest.raises(CaptureError, match=sentence) as info:
            capture(gm)
        errors.append(info.value)
        return aot_eager(gm, inputs)  # the original still compiles

    value = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(f, backend=backend)(value), f(value))
    assert errors[0].node and "test_capture.py" in errors[0].line


# Inductor, threads, time.


@pytest.mark.parametrize("make_model", [Tables, lambda: nn.EmbeddingBag(50, 4, mode="mean")])
def test_inductor(make_model: Callable[[], nn.Module]) -> None:
    check(make_model(), ids(3), batches=(7, 2), then=compile_fx)


def test_threads() -> None:
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    for n in (2, 4):
        torch.compile(Tables(n), backend=lambda gm, _: graphs.append(gm) or gm.forward)(ids(n)(3)[0])
    alone = [capture(gm).gm.code for gm in graphs]
    results: list[list[str]] = [[], []]

    def work(i: int) -> None:
        results[i] = [capture(graphs[i]).gm.code for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[code] * 5 for code in alone]


def test_time_is_linear() -> None:
    """Also where one node has many results, all of which are used."""

    def per_node(n: int) -> float:
        times: list[float] = []

        def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
            for _ in range(3):
                gc.collect()
                start = time.process_time()
                capture(gm)
                times.append((time.process_time() - start) / len(gm.graph.nodes))
            return gm.forward

        def products(v: Tensor) -> Tensor:
            columns = v.split(1, 1)
            return torch.cat([columns[i] * columns[i - 1] for i in range(n)], 1)

        torch._dynamo.reset()
        torch.compile(products, backend=backend)(torch.randn(3, n))
        return min(times)

    per_node(4)  # imports and first-call caches
    small, large = per_node(50), per_node(200)
    assert large < 2 * small, (small, large)
