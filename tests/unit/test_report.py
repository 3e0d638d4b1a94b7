"""The record and its views: text that reads as sentences, and versioned JSON."""

import json
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import fx

from recompile.options import Options
from recompile.pass_list import ordered, parse_passes, spelled
from recompile.pipeline import run_passes
from recompile.profile import measure
from recompile.report import (
    VERSION,
    CostRecord,
    GraphRecord,
    Measured,
    PassRecord,
    Refusal,
    RegionRecord,
    Report,
    RuleRecord,
    collect,
    last_report,
    new_graph,
    reset,
    user_line,
)
from recompile.rewrite import Pass, registry
from recompile.testing import capture


@dataclass(frozen=True)
class Mine(Pass):
    on: bool = True
    n: int = 1
    x: float = 1.0
    word: str = ""


def report(*passes, **graph):
    return Report(graphs=[GraphRecord(passes=list(passes), **graph)])


def pass_record(*rules, **more):
    return PassRecord("fuse-lookups", "reassociate", 9, 4, 1.5, list(rules), **more)


def test_json_has_a_version_and_everything():
    given = report(pass_record(RuleRecord("a", 2, 1, [Refusal("why", "n", "line")])), fallback=Refusal("no"))
    found = json.loads(given.to_json())
    assert found["version"] == VERSION
    assert found["graphs"][0]["passes"][0]["rules"][0]["refused"] == [
        {"why": "why", "node": "n", "line": "line"}
    ]
    assert found["graphs"][0]["fallback"]["why"] == "no"


def test_text_tells_what_a_pass_did():
    text = report(pass_record(RuleRecord("fuse-lookups", 3, 1)), nodes_before=9, nodes_after=4).text()
    assert "graph 0: 9 nodes -> 4" in text
    assert "fired 1 time, tried 3, refused 0" in text
    text = report(pass_record(RuleRecord("fuse-lookups", 3, 3))).text()
    assert text.splitlines()[2].endswith("    fired 3 times")  # all that were tried


def test_the_same_refusal_is_folded_into_a_count():
    refused = [Refusal("the table is sparse", f"e{i}", f"m.py:{i} in f: x[0]") for i in range(3)]
    text = report(pass_record(RuleRecord("fuse-lookups", 3, 0, refused))).text()
    line = "the table is sparse [e0] at m.py:0 in f: x[0] (and 2 more like it)"
    assert f"fuse-lookups did not fire: {line}" in text
    assert text.count("sparse") == 1


def test_a_long_line_goes_on_behind_its_indent():
    refused = [Refusal("of this", "n", f"m.py:3 in f: {'x + ' * 40}x")]
    shown = report(pass_record(RuleRecord("mine", 1, 0, refused)), nodes_before=1).text(60).splitlines()
    start = next(k for k, line in enumerate(shown) if line.startswith("  mine did not fire"))
    assert all(
        line.startswith(" " * 6) and line[6] in "x+" and len(line) <= 60
        for line in shown[start + 1 : start + 3]
    )
    assert "graph 0: 1 node -> 0" in shown[0]


def test_what_was_refused_stands_before_what_had_no_candidate():
    text = report(pass_record(RuleRecord("idle"), RuleRecord("mine", 1, 0, [Refusal("of this")]))).text()
    assert text.index("mine did not fire") < text.index("met no candidate: idle")


def test_many_sentences_of_one_rule_are_cut():
    refused = [Refusal(f"found {min(i, 13)}", f"n{i}") for i in range(16)]
    text = report(pass_record(RuleRecord("mine", 16, 0, refused))).text()
    assert "found 9 [n9]" in text and "found 10" not in text
    assert "mine did not fire 6 times for 4 other reasons" in text


def test_a_rule_that_had_nothing_to_do_is_said():
    tried = [RuleRecord("drop-no-op", tried=1), RuleRecord("drop-squeeze", tried=26)]
    text = report(pass_record(RuleRecord("flatten-cat"), *tried)).text()
    assert "tried, and nothing fitted: 26 x drop-squeeze, 1 x drop-no-op" in text
    assert "met no candidate: flatten-cat" in text
    many = report(pass_record(*(RuleRecord(f"rule-{k}") for k in range(21))))
    assert "met no candidate: rule-0, rule-1, rule-2 and 18 more rules" in many.text()
    assert "rule-20" in many.to_json()


def test_a_pass_that_is_one_rule_says_in_its_own_line_what_it_tried():
    def line(tried):
        rule = RuleRecord("fuse-lookups", tried=tried)
        return report(PassRecord("fuse-lookups", "reassociate", rules=[rule])).text()

    assert "tried 2, and nothing fitted" in line(2) and line(2).count("tried") == 1
    assert "nothing to do" in line(0) and "candidate" not in line(0)


PASSES = [
    "default",
    "default,fuse-lookups{min-tables=8},-rewrite-attention",
    "canonicalize,fuse-lookups{min-tables=8}",
    "",
]


@pytest.mark.parametrize("given", PASSES)
def test_the_passes_of_a_report_can_be_pasted_back(given):
    record, passes = GraphRecord(), ordered(parse_passes(given))
    run_passes(capture(lambda x: x + 1, torch.ones(2)), Options(passes=given), record)
    assert record.chosen == given
    shown = [line for line in Report(graphs=[record]).text().splitlines() if "passes: " in line]
    pasted = shown[0].partition("passes: ")[2] if given else ""
    assert ordered(parse_passes(pasted)) == passes
    assert json.loads(Report(graphs=[record]).to_json())["graphs"][0]["chosen"] == given


def test_settings_of_a_pass_of_yours_can_be_pasted_back(monkeypatch):
    monkeypatch.setitem(registry._known, "mine", Mine)
    given = [Mine(False, 3, 0.5, "a"), Mine()]
    assert [spelled([each]) for each in given] == ["mine{on=false,n=3,x=0.5,word=a}", "mine"]
    assert [parse_passes(spelled([each])) for each in given] == [[each] for each in given]


def test_failed_and_skipped_passes_say_why():
    text = report(pass_record(error="ValueError: [red]no"), pass_record(skipped="it is too fast")).text()
    assert "was undone: ValueError: [red]no" in text
    assert "did not run: it is too fast" in text


def test_regions_and_their_lines():
    region = RegionRecord("lookup", "recompile.lookup", 2, "2 bags", ["m.py:3", "m.py:3", "m.py:4"])
    text = report(regions=[region]).text()
    assert "lookup: 2 bags" in text and "m.py:3  x2" in text and "m.py:4" in text


def test_what_a_region_reads_costs_and_is_bound_by():
    cost = CostRecord("800", "16000", 800, 16000)
    reads = {"a": "f32[20, 4]", "b": "f32[20, 4]", "ids": "i64[5]"}
    more = {"reads": reads, "writes": ["f32[5, 8]"], "before": cost, "after": cost, "device": "cpu"}
    region = RegionRecord("r", "op", **more, bound="memory", kernel="graph-0/kernels/r.cpp")
    text = report(regions=[region]).text()
    assert "reads 2 x f32[20, 4], i64[5]; writes f32[5, 8]" in text
    assert "each operator alone -> fused: 800 B -> 800 B moved, 16 kFLOP -> 16 kFLOP" in text
    assert "20 FLOP a byte, bound by memory" in text and "kernel: graph-0/kernels/r.cpp in the dump" in text
    assert "bound by memory or compute" in report(regions=[replace(region, bound="")]).text()
    measured = replace(region, measured=Measured(1.5, "compute", 0.52))
    text = report(regions=[measured]).text()
    assert "1.500 ms, bound by compute, 52% of the speed of a large matrix product" in text
    assert "memory" not in text


def test_a_region_on_a_gpu_says_that_it_is_not_measured():
    cost = CostRecord("8", "16", 8, 16)
    given = report(regions=[RegionRecord("r", "recompile.r", device="cuda", before=cost, after=cost)])
    measure(given, [], lambda: None)
    assert "not measured on cuda" in given.text() and "bound by" not in given.text()
    assert Report.from_json(given.to_json()) == given


def test_a_fallback_says_why():
    text = report(fallback=Refusal("a sentence", "node_1", "m.py:2 in f: y")).text()
    assert "compiled by plain Inductor" in text
    assert "because a sentence [node_1] at m.py:2 in f: y" in text


def test_no_graph_yet():
    assert "No graph" in Report().text()


def test_collect_sees_only_its_own_thread():
    with collect() as mine:
        thread = threading.Thread(target=new_graph)
        thread.start()
        thread.join()
        record = new_graph()
    new_graph()
    assert mine.graphs == [record] and mine.graphs[0] is record


def test_records_of_many_threads_have_their_own_index():
    reset()
    threads = [threading.Thread(target=new_graph) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [graph.index for graph in last_report().graphs] == list(range(20))
    reset()
    assert last_report().graphs == []


CELLS = """
import recompile, torch
def model(x):
    return x.softmax(-1) @ x
--
with recompile.dump("out"):
    torch.compile(model, backend="recompile")(torch.randn(4, 4))
--
print(recompile.last_report().to_json(), open("out/graph-0/00-captured.py").read())
"""


def test_a_line_of_a_notebook_is_told_by_its_cell(tmp_path, monkeypatch, capsys):
    """In IPython's own shell; the compiler of Jupyter's kernel derives from its."""
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    try:
        for cell in CELLS.split("--"):
            shell.run_cell(cell, store_history=True).raise_error()
    finally:
        InteractiveShell.clear_instance()
    shown = capsys.readouterr().out
    assert "In[1]:3 in model: return x.softmax(-1) @ x" in shown and "# model In[1]:3" in shown
    assert "ipython-input" not in shown


def node_with(trace):
    node = fx.Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    return node


def test_the_users_line_is_the_innermost_that_is_not_torchs():
    trace = (
        '  File "/home/me/model.py", line 9, in forward\n    return self.e(x)\n'
        '  File "/home/me/model.py", line 41, in embed\n    x = self.e(x)\n'
        f'  File "{torch.nn.__file__}", line 192, in forward\n    return F.embedding(\n'
    )
    assert user_line(node_with(trace)) == "model.py:41 in embed: x = self.e(x)"


def test_no_trace_is_no_line():
    assert user_line(node_with(None)) == ""
    assert user_line(fx.Graph().placeholder("x")) == ""
