"""The record and its views: text that reads as sentences, and versioned JSON."""

import json
import threading

import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import fx

from recompile.report import (
    VERSION,
    GraphRecord,
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
    assert text.index("mine did not fire") < text.index("for want of candidates: idle")


def test_many_sentences_of_one_rule_are_cut():
    refused = [Refusal(f"found {min(i, 13)}", f"n{i}") for i in range(16)]
    text = report(pass_record(RuleRecord("mine", 16, 0, refused))).text()
    assert "found 9 [n9]" in text and "found 10" not in text
    assert "mine did not fire 6 times for 4 other reasons" in text


def test_a_rule_that_had_nothing_to_do_is_said():
    text = report(pass_record(RuleRecord("flatten-cat"), RuleRecord("drop-no-op", tried=2))).text()
    assert "fired 0 times, for want of candidates: flatten-cat, drop-no-op (tried 2)" in text


def test_failed_and_skipped_passes_say_why():
    text = report(pass_record(error="ValueError: [red]no"), pass_record(skipped="it is too fast")).text()
    assert "was undone: ValueError: [red]no" in text
    assert "did not run: it is too fast" in text


def test_regions_and_their_lines():
    region = RegionRecord("lookup", "recompile.lookup", 2, "2 bags", ["m.py:3", "m.py:3", "m.py:4"])
    text = report(regions=[region]).text()
    assert "lookup: 2 bags" in text and "m.py:3  x2" in text and "m.py:4" in text


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
