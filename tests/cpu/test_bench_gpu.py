"""The GPU benchmarks, without a GPU: every case tiny on the CPU, and the runner with a clock on the wall."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from benchmarks.gpu import figures, predict, table
from benchmarks.gpu.__main__ import FOLDER, main
from benchmarks.gpu.case import Case, Need, Problem, Variant
from benchmarks.gpu.check import error
from benchmarks.gpu.clock import Wall, _is_kernel
from benchmarks.gpu.compare import compare
from benchmarks.gpu.limit import Overtime, at_most
from benchmarks.gpu.measure import Settings, measure
from benchmarks.gpu.record import Record, Results, find
from benchmarks.gpu.rivals import fbgemm
from benchmarks.gpu.run import DONE, RESTART, all_cases, facts, run
from benchmarks.gpu.variants import OURS, variants
from benchmarks.gpu.work import distinct, work
from recompile.zoo.data import skewed

CASES = {case.name: case for case in all_cases()}
TINY = Settings(limit=60, case=120, seconds=0, rounds=2, scale=0.002)
CEILINGS = {"bytes_per_s": 1e12, "flops_per_s": 1e14}


def seeds(case, scale):
    torch.manual_seed(0)
    shapes = work(case, scale).outputs if case.train else ()
    return [torch.randn(shape, dtype=case.dtype) for shape in shapes]


def wrong(case, call=None, scale=TINY.scale):
    """Eager's error, or that of `call(model)`."""
    given = seeds(case, scale)
    problem = case.make("cpu", scale)
    return error(problem, call(problem.model) if call else problem.model, tuple, given, case.train)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_built_and_eager_is_right(name):
    case = CASES[name]
    allowed = 4 * case.tolerance if case.dtype is torch.bfloat16 and case.train else case.tolerance
    assert wrong(case) < allowed


def test_wrong_values_gradients_and_unwritten_memory_are_seen():
    case = CASES["lookup, 26 tables of width 16, 20 ids, batch 2048, training"]

    def scaled(model):
        return lambda *inputs: model(*inputs) * 1.01

    def wrong_gradient(model):
        class Twice(torch.autograd.Function):
            forward = staticmethod(lambda ctx, x: x.clone())
            backward = staticmethod(lambda ctx, grad: grad * 2)

        return lambda *inputs: Twice.apply(model(*inputs))

    def unwritten(model):
        def call(*inputs):
            out = model(*inputs)
            out.data[-1] = torch.nan
            return out

        return call

    def infinite(scale):
        problem = case.build(scale)
        nn.init.constant_(problem.model.tables[0].weight, torch.inf)
        return problem

    assert wrong(case) < 1e-4
    assert wrong(replace(case, build=infinite)) == float("inf")
    assert wrong(case, scaled) > 5e-3
    assert wrong(case, wrong_gradient) > 0.5
    assert wrong(case, unwritten) == float("inf")


def test_what_a_run_wrote_is_nan_before_the_next():
    case, seen = CASES["lookup, 26 tables of width 16, 1 id, batch 2048"], []

    def reusing(model):
        held = []

        def call(*inputs):
            seen.extend(bool(out.isnan().all()) for out in held)
            held[:] = [model(*inputs)]
            return held[0]

        return call

    wrong(case, reusing, scale=0.01)
    assert seen == [True]


def test_the_library_agrees_with_the_model_it_stands_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    for name, case in CASES.items():
        if case.group == "softmax":
            problem = replace(case, dtype=torch.float32).make("cpu", 0.01)
            problem.model.requires_grad_(False)
            inputs, expected = problem.inputs(), None
            for rival in case.rivals.values():
                variant = rival(problem.model)
                with torch.no_grad():
                    found = variant.call(*variant.prepare(inputs))
                    expected = problem.model(*inputs) if expected is None else expected
                torch.testing.assert_close(found, expected, msg=name)


class Batched:
    """What is used of FBGEMM's lookup, as its documentation describes it."""

    def __init__(self, specs):
        self.weights = [torch.empty(rows, width) for rows, width, *_ in specs]

    def split_embedding_weights(self):
        return self.weights

    def __call__(self, indices, offsets):
        bags = offsets[:-1].view(len(self.weights), -1)
        ends = [*offsets[:: bags.shape[1]].tolist()[1:]]
        parts = [
            nn.functional.embedding_bag(indices[at[0] : end], weight, at - at[0], mode="sum")
            for weight, at, end in zip(self.weights, bags, ends, strict=True)
        ]
        return torch.cat(parts, 1)


def test_ids_are_laid_out_for_fbgemm(monkeypatch):
    package = "fbgemm_gpu.split_table_batched_embeddings_ops"
    device = SimpleNamespace(DEVICE=0, CUDA=1)
    training = SimpleNamespace(ComputeDevice=device, SplitTableBatchedEmbeddingBagsCodegen=Batched)
    monkeypatch.setitem(sys.modules, f"{package}_training", training)
    monkeypatch.setitem(sys.modules, f"{package}_common", SimpleNamespace(EmbeddingLocation=device))
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", SimpleNamespace())
    for case in (CASES["lookup, 26 tables of width 16, 20 ids, batch 2048"], CASES[MIXED]):
        problem = case.make("cpu", 0.01)
        inputs, variant = problem.inputs(), fbgemm(problem.model)
        torch.testing.assert_close(variant.call(*variant.prepare(inputs)), problem.model(*inputs).detach())


MIXED = "lookup, 800 tables of widths 4 to 128, batch 2048"
COMPILED = (
    f"{MIXED}, training",
    "HSTU, batch 64, N 1024, 4 heads of 64, training",
    "DIN, batch 64",
)


@pytest.mark.parametrize("name", COMPILED)
def test_a_case_is_measured(name):
    case = replace(CASES[name], rivals={})
    makers = {key: make for key, make in variants(case, quick=True).items() if key in ("recompile", "eager")}
    record = measure(case, makers, Wall(), TINY, time.monotonic() + 100)
    assert record.skipped == {} and record.failed == ""
    assert set(record.ms) == {"recompile", "eager"} and figures.is_right(record)
    assert record.compile_s["recompile"] > 0 and record.bytes > 0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight


def toy(name, group="toys", **kw):
    def build(scale):
        return Problem(Twice(), lambda: (torch.randn(4, 3),))

    return Case(name, group, build, (Need("inductor", 1.0),), **kw)


def eager(case):
    return {"recompile": Variant, "inductor": Variant}


def start(cases, results, ways=eager, clock=None, seconds=60.0, settings=TINY, **kw):
    said = []
    deadline = time.monotonic() + seconds
    status = run(cases, ways, results, clock or Wall(), settings, deadline, say=said.append, **kw)
    return status, said


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "gpu.json", {"device": "none"})


def test_more_than_eight_variants_are_all_compiled():
    """Dynamo runs a model as it is, once it has compiled it eight times."""
    compiled = []

    def make(k):
        def backend(gm, inputs):
            compiled.append(k)
            return gm.forward

        return lambda model: Variant(torch.compile(model, backend=backend))

    record = measure(toy("many"), {str(k): make(k) for k in range(11)}, Wall(), TINY, time.monotonic() + 60)
    assert record.skipped == {} and compiled == [*range(11)]


def test_a_run_goes_on_where_it_stopped(results):
    cases = [toy("a"), toy("b"), toy("other")]
    assert start(cases, results, only="a")[0] == DONE
    again = Results.load(results.path)
    assert again == results and list(again.records) == ["a"]
    status, said = start(cases, again)
    assert status == DONE and list(again.records) == ["a", "b", "other"]
    assert said[0].startswith("b: recompile") and said[-1] == "0 cases left"


def test_a_failing_variant_and_a_failing_case_are_recorded_and_the_rest_goes_on(results):
    def broken(scale):
        raise RuntimeError("no such table\nat line 3")

    def failing(model):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    cases = [replace(toy("broken"), build=broken), toy("half"), toy("whole")]
    start(
        cases, results, lambda case: eager(case) | {"eager": failing} if case.name == "half" else eager(case)
    )
    assert results.records["broken"].failed == "RuntimeError: no such table"
    assert results.records["half"].skipped == {"eager": "RuntimeError: CUDA out of memory. Tried to allocate"}
    assert set(results.records["half"].ms) == {"recompile", "inductor"}
    assert results.records["whole"].skipped == {}
    text = results.path.with_suffix(".md").read_text()
    assert "- broken: RuntimeError: no such table" in text and "- half, eager: RuntimeError" in text


def test_a_case_that_ended_the_process_is_not_begun_again(results):
    results.begin("killer")
    again = Results.load(results.path)
    start([toy("killer"), toy("next")], again)
    assert again.records["killer"].failed == "the process ended while it ran"
    assert again.records["next"].ms


def test_a_device_that_no_longer_answers_needs_a_new_process(results):
    class Broken(Wall):
        def is_well(self):
            return False

    status, _ = start([toy("a"), toy("b")], results, clock=Broken())
    assert status == RESTART and list(results.records) == ["a"]


def test_a_variant_that_takes_too_long_is_left_out_by_the_next_process(results):
    def ways(case):
        return {"recompile": Variant, "slow": lambda model: Variant(lambda x: time.sleep(60))}

    short = replace(TINY, limit=3)
    assert start([toy("a"), toy("b")], results, ways, settings=short)[0] == RESTART
    assert results.running == "" and not results.records
    again = Results.load(results.path)
    assert start([toy("a"), toy("b")], again, ways, only="a", settings=short)[0] == DONE
    assert again.records["a"].skipped == {"slow": "not compiled and checked within 3 s"}
    assert set(again.records["a"].ms) == {"recompile"}


def test_a_variant_that_would_begin_too_late_is_left_out():
    late = replace(TINY, case=-1)
    record = measure(toy("a"), {"recompile": Variant}, Wall(), late, time.monotonic() + 30)
    assert "no time for it" in record.skipped["recompile"]


def test_the_budget_ends_a_run_in_good_order(results):
    def slow(case):
        pause = 0.0 if case.name == "quick" else 60.0
        return {"recompile": lambda model: Variant(lambda x: time.sleep(pause) or model(x))}

    cases = [toy("quick"), toy("slow", "s"), toy("last")]
    # Measuring these, and the quick case, could take a busy machine all of the budget.
    results.ceilings = CEILINGS
    start(cases, results, slow, only="quick")
    status, said = start(cases, results, slow, seconds=3.0)
    assert status == DONE and said[-1] == "2 cases left: run again to go on, next is slow"
    assert results.running == "" and list(results.records) == ["quick"]
    start(cases, results, slow, seconds=3.0, settings=replace(TINY, case=1.0))
    assert results.records["slow"].failed.startswith("not finished within")  # it had nearly all of the time


def test_overtime_is_no_exception_that_a_compiler_would_answer():
    with pytest.raises(Overtime), at_most(0.05):
        try:
            time.sleep(5)
        except Exception:
            pytest.fail("swallowed")


def test_results_are_found_again_by_their_facts(tmp_path):
    held = facts(Wall(), quick=True, tuned=False)
    assert json.loads(json.dumps(held)) == held
    first = find(tmp_path, "gpu", held, "2000-01-01", fresh=False)
    first.save()
    assert find(tmp_path, "gpu", held, "2000-01-02", fresh=False).path == first.path
    assert (
        find(tmp_path, "gpu", held | {"torch": "9"}, "2000-01-02", False).path.name == "gpu-2000-01-02.json"
    )
    assert find(tmp_path, "gpu", held, "2000-01-01", fresh=True).path.name == "gpu-2000-01-01-2.json"


def record_of(case, ours, base, wrong=0.0):
    ms = {"recompile": ours, "recompile graphs": ours, "inductor": base, "inductor graphs": base}
    errors = dict.fromkeys(OURS[:2], wrong)
    return Record(case.name, case.group, case.tolerance, 1e9, 2e9, 1e12, ms, errors=errors)


def test_figures_verdicts_and_the_table(results):
    pooled = CASES["lookup, 26 tables of width 64, 20 ids, batch 65536"]
    hstu = CASES["HSTU, batch 8, N 8192, 4 heads of 128"]
    results.ceilings = CEILINGS
    results.records = {
        pooled.name: record_of(pooled, 2.0, 8.0),
        hstu.name: record_of(hstu, 8.0, 16.0),
        "DLRM, batch 512": record_of(CASES["DLRM, batch 512"], 1.0, 2.0, wrong=1.0),
    }
    assert figures.value("copy", results.records[pooled.name], CEILINGS) == pytest.approx(1.0)
    assert figures.fraction(results.records[pooled.name], CEILINGS) == pytest.approx(5.0)
    text = table.markdown(results, list(CASES.values()))
    lines = {
        tuple(cell.strip() for cell in line.split("|")[1:6]) for line in text.splitlines() if "|" in line
    }
    assert (pooled.name, "of a copy's bandwidth", "1", ">= 0.75", "PASS") in lines
    assert (pooled.name, "x Inductor", "4", ">= 3", "PASS") in lines
    assert (pooled.name, "x FBGEMM", "", ">= 1", "NO FIGURE") in lines
    assert (hstu.name, "x Inductor", "2", ">= 3", "SHORT") in lines
    assert (hstu.name, "TFLOP/s", "125", ">= 250", "SHORT") in lines
    assert ("DLRM, batch 512", "x Inductor, both with CUDA graphs", "2", ">= 0.97", "WRONG") in lines
    assert any(line[0].startswith("geometric mean of 1 models") and line[2] == "2" for line in lines)


def test_two_runs_are_compared(results):
    case = CASES["DLRM, batch 512"]
    other = replace(results, records={case.name: record_of(case, 1.1, 2.0)})
    results.records = {case.name: record_of(case, 1.0, 2.0)}
    text = compare(results, other)
    assert "| 1.100 |" in text and "largest 10.0%" in text and "nothing but time" in text


@pytest.mark.parametrize("rows, draws", [(50, 20), (1000, 3000), (20_000, 5)])
def test_the_expected_number_of_distinct_ids(rows, draws):
    draw = torch.Generator().manual_seed(0)
    counts = [len(skewed(rows, (draws,), draw).unique()) for _ in range(300)]
    assert distinct(rows, draws) == pytest.approx(sum(counts) / 300, rel=0.02)


def test_attention_is_counted_by_its_pairs():
    needed = work(CASES["HSTU, batch 8, N 8192, 4 heads of 128"])
    assert needed.flops == 4 * 8 * 4 * 8192**2 * 128 / 2
    inputs = 8 * 8193 * 8 + 2 * (2 * 8192 - 1 + 129)  # times, and the two tables of biases
    assert needed.bytes == 4 * 8 * 4 * 8192 * 128 * 2 + inputs
    training = work(CASES["HSTU, batch 8, N 8192, 4 heads of 128, training"])
    assert training.flops == 3.5 * needed.flops


def test_the_committed_predictions_are_those_of_the_code():
    """One in four, and few of those with 500 tables or more: all take a minute. `--predict` writes the file anew."""
    held = json.loads((FOLDER / "predicted.json").read_text())
    assert [row["case"] for row in held] == list(CASES)
    chosen = [name for name in CASES if not re.search(", (500|800|10000) tables", name)][::4]
    chosen.append("lookup, 500 tables of width 128, 20 ids, batch 65536, training")
    by_name = {row["case"]: row for row in held}
    assert predict.predictions([CASES[name] for name in chosen]) == [by_name[name] for name in chosen]
    assert (FOLDER / "predicted.md").read_text() == predict.markdown(held)
    assert all(row["measured_ms"] is None for row in held)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out


def test_a_worker_that_dies_is_followed_by_another(monkeypatch):
    statuses, commands = [-11, RESTART, DONE], []

    def worker(command, **_):
        commands.append(command[3:])
        return SimpleNamespace(returncode=statuses.pop(0))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("subprocess.run", worker)
    assert main(["--fresh", "--quick"]) == DONE
    assert [command[:-1] for command in commands] == [
        ["--fresh", "--quick", "--until"],
        *[["--quick", "--until"]] * 2,
    ]


def test_only_kernels_count_as_launches():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        torch.ones(3).sum()
    assert profiled.events() and not any(map(_is_kernel, profiled.events()))
    kernel = SimpleNamespace(name="triton_poi", device_type=DeviceType.CUDA, is_user_annotation=False)
    assert _is_kernel(kernel)
    assert not _is_kernel(SimpleNamespace(**vars(kernel) | {"name": "Memset (Device)"}))
    assert not _is_kernel(SimpleNamespace(**vars(kernel) | {"is_user_annotation": True}))
