"""The page of a dump, without a browser: groups, folds, rows, differences, size, escaping."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from recompile.page import html
from recompile.page.box import Box, Wires, depths
from recompile.page.diff import blocks
from recompile.page.folding import fold, short
from recompile.page.layout import FARTHEST, WIDEST, rows
from recompile.page.tree import LONGEST, tree
from recompile.rewrite.registry import registered
from tests.page.graphs import HOSTILE, Recorder, large, tables


def content(page):
    """What the page's script will read."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def every(box):
    yield box
    for child in box.children:
        yield from every(child)


def labels(box):
    return [child.label or child.node for child in box.children]


def random_edges(count, seed):
    chance = random.Random(seed)
    found = {(a, b) for b in range(1, count) for a in chance.sample(range(b), min(b, chance.randint(0, 3)))}
    return [(a, b, 1) for a, b in sorted(found)]


@pytest.mark.parametrize("seed", range(5))
def test_every_box_is_in_one_row_below_all_that_it_reads(seed):
    edges = random_edges(80, seed)
    found = rows(80, edges)
    level = {box: r for r, row in enumerate(found) for box in row if box >= 0}
    assert sorted(box for row in found for box in row if box >= 0) == list(range(80))
    assert all(level[a] < level[b] for a, b, _ in edges)


@pytest.mark.parametrize("seed", range(5))
def test_an_edge_has_a_bend_in_every_row_that_it_passes(seed):
    edges = random_edges(80, seed)
    found = rows(80, edges)
    level = {box: r for r, row in enumerate(found) for box in row if box >= 0}
    for k, (a, b, _) in enumerate(edges):
        bends = [r for r, row in enumerate(found) if -1 - k in row]
        near = level[b] - level[a] <= FARTHEST
        assert bends == (list(range(level[a] + 1, level[b])) if near else [])


def test_rows_are_no_wider_than_allowed():
    edges = [(0, k, 1) for k in range(1, 50)] + [(k, 50, 1) for k in range(1, 50)]
    assert max(len([box for box in row if box >= 0]) for row in rows(51, edges)) == WIDEST


def test_rows_are_sorted_so_that_no_edges_cross_where_none_must():
    crossed = [(0, 5, 1), (1, 4, 1), (2, 3, 1), (3, 6, 1), (4, 6, 1), (5, 6, 1)]
    upper, lower = rows(7, crossed)[:2]
    partner = {a: b for a, b, _ in crossed[:3]}
    assert [partner[box] for box in upper] == lower


def test_a_cycle_has_no_rows():
    with pytest.raises(ValueError, match="cycle"):
        depths(2, [(0, 1, 1), (1, 0, 1)])


def test_a_thousand_tables_are_a_handful_of_boxes():
    _, (graph,), _ = tables(1000)
    root = tree(graph["nodes"], graph["stages"][0]["order"])
    assert [(box.kind, box.label, len(box.leaves)) for box in root.children] == [
        ("fold", "ids_*", 1000),
        ("fold", "embedding", 1000),
        ("node", "", 1),
        ("module", "tower", 4),
        ("node", "", 1),
    ]
    assert [(a, b, n) for a, b, n in root.edges] == [(0, 1, 1000), (1, 2, 1000), (2, 3, 1), (3, 4, 1)]


def test_boxes_that_are_read_by_others_too_are_not_folded():
    nodes = [named(f"e_{k}", "aten.embedding.default") for k in range(5)]
    nodes += [named("cat", "aten.cat.default"), named("sum", "aten.sum.default")]
    wires = Wires({**{k: [] for k in range(5)}, 5: [0, 1, 2, 3, 4], 6: [4]})
    found = fold([Box(node=k) for k in range(7)], wires, nodes)
    assert [box.leaves for box in found] == [[0, 1, 2, 3], [4], [5], [6]]
    assert found[0].kind == "fold" and found[1].kind == "node"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("aten.embedding.default", "embedding"),
        ("_operator.getitem", "getitem"),
        ("torch._C._set_grad_enabled", "_set_grad_enabled"),
    ],
)
def test_operators_are_called_by_their_short_name(target, name):
    assert short({"target": target}) == name


def test_two_equal_boxes_stay_two():
    nodes = [named("a", "aten.relu.default"), named("b", "aten.relu.default")]
    assert len(fold([Box(node=0), Box(node=1)], Wires({0: [], 1: []}), nodes)) == 2


def test_equal_modules_fold_under_their_common_path():
    made = Recorder("")
    order = [made.node("x", "X")]
    for k in range(4):
        module = f"L['self'].experts.{k}.mlp"
        order.append(made.node(f"l_{k}", "aten.linear.default", ["x"], module=module))
        order.append(made.node(f"r_{k}", "aten.relu.default", [f"l_{k}"], module=module))
    root = tree(made.graph["nodes"], order)
    assert [box.label for box in root.children] == ["", "experts.*.mlp"]
    assert [box.label for box in root.children[1].children] == [f"{k}.mlp" for k in range(4)]


def test_a_module_that_is_called_twice_is_two_groups():
    made = Recorder("")
    order, source = [made.node("x", "X")], "x"
    for k in range(2):
        for name, module in ((f"a_{k}", "norm"), (f"b_{k}", "norm"), (f"c_{k}", "")):
            order.append(made.node(name, "aten.add.Tensor", [source], module=module))
            source = name
    root = tree(made.graph["nodes"], order)
    assert labels(root) == [0, "norm", 3, "norm", 6]


def test_a_line_in_a_loop_does_not_tear_its_modules_apart():
    made, source = Recorder(""), "x"
    order = [made.node("x", "X")]
    for k in range(10):  # the way to the query is longer than the way to the key
        line, module = "model.py:5 in forward: x = self.attention[i](norm(x), x)", f"attention.{k}"
        order.append(made.node(f"norm_{k}", "aten.layer_norm.default", [source], line=line))
        order.append(made.node(f"twice_{k}", "aten.mul.Tensor", [f"norm_{k}"], line="model.py:6 in f: 2 * x"))
        order.append(made.node(f"q_{k}", "aten.linear.default", [f"twice_{k}"], module=module))
        order.append(made.node(f"k_{k}", "aten.relu.default", [source], module=module))
        order.append(made.node(f"add_{k}", "aten.add.Tensor", [f"q_{k}", f"k_{k}"], module=module))
        order.append(made.node(f"out_{k}", "aten.add.Tensor", [f"add_{k}", source], line=line))
        source = f"out_{k}"
    groups = [box for box in every(tree(made.graph["nodes"], order)) if box.kind == "module" and box.label]
    assert sorted(len(box.leaves) for box in groups) == [3] * 10


def test_a_long_group_is_split_by_source_line_and_then_into_parts():
    made = Recorder("")
    order = [made.node("x", "X")]
    for k in range(60):
        line = f"model.py:{k // 2} in forward: x = f(x)"
        order.append(made.node(f"n_{k}", "aten.relu.default", [f"n_{k - 1}" if k else "x"], line=line))
    by_line = tree(made.graph["nodes"], order)
    assert [box.kind for box in by_line.children] == ["node"] + ["line"] * 30
    for node in made.graph["nodes"]:
        node["line"] = ""
    assert {box.kind for box in tree(made.graph["nodes"], order).children} == {"part", "node"}


def test_a_long_module_of_one_line_keeps_its_name():
    made = Recorder("")
    order = [made.node("x", "X")]
    for k in range(30):
        line = "model.py:3 in forward: x = self.tower(x)"
        source = f"n_{k - 1}" if k else "x"
        order.append(made.node(f"n_{k}", "aten.relu.default", [source], line=line, module="tower"))
    assert labels(tree(made.graph["nodes"], order)) == [0, "tower"]


def test_every_node_but_weights_has_one_box():
    _, (graph,), _ = large(800, stages=2)
    for stage in graph["stages"]:
        root = tree(graph["nodes"], stage["order"])
        assert sorted(box.node for box in every(root) if box.node >= 0) == sorted(stage["order"])
        assert max(len(box.children) for box in every(root) if box.kind != "fold") <= LONGEST


def test_weights_have_no_box():
    _, (graph,), _ = tables(3)
    shown = {graph["nodes"][i]["name"] for i in tree(graph["nodes"], graph["stages"][0]["order"]).leaves}
    assert not [name for name in shown if "parameters" in name]
    assert "l_ids_0_" in shown


def test_blocks_name_the_lines_that_differ():
    assert blocks([1, 2, 3, 4], [1, 5, 3, 4, 6]) == [(1, 2, 1, 2), (4, 4, 4, 5)]
    assert blocks([1, 2, 3], [1, 2, 3]) == []
    assert blocks([], [1]) == [(0, 0, 0, 1)]
    assert blocks([1, 2], []) == [(0, 2, 0, 0)]


def test_a_moved_line_is_the_only_difference():
    assert blocks([1, 2, 3, 4, 5], [5, 1, 2, 3, 4]) == [(0, 0, 0, 1), (4, 5, 5, 5)]


@pytest.mark.parametrize("seed", range(10))
def test_blocks_turn_one_stage_into_the_other(seed):
    chance = random.Random(seed)
    before = chance.sample(range(60), 40)
    after = chance.sample(range(60), 40)
    found, at = [], 0
    for a0, a1, b0, b1 in blocks(before, after):
        found += before[at:a0] + after[b0:b1]
        at = a1
    assert found + before[at:] == after


def test_a_large_graph_is_small_and_fast():
    report, graphs, sources = large()
    start = time.process_time()
    page = html(report, graphs, sources)
    assert time.process_time() - start < 20  # 2 s on two cores of an AMD EPYC
    assert len(page.encode()) < 5_000_000
    first = tree(graphs[0]["nodes"], graphs[0]["stages"][0]["order"])
    assert len(first.children) <= LONGEST


def test_an_unchanged_stage_is_kept_once():
    captured, unchanged, fused = content(html(*tables()))["graphs"][0]["stages"]
    assert captured["tree"] and captured["diff"] == []
    assert set(unchanged) == {"pass", "ms"}
    assert fused["diff"] and fused["tree"]


def test_nothing_in_a_source_line_ends_the_script():
    page = html(*tables(line=HOSTILE))
    plain = html(*tables())
    assert page.count("</script") == plain.count("</script")
    assert "<!--" not in page
    assert HOSTILE in content(page)["texts"]
    page.encode()  # a lone surrogate would fail here


def test_text_that_looks_like_a_hole_of_the_template_stays_text():
    page = html(*tables(line="model.py:1 in f: /*script*/ {data} \\1"))
    assert "model.py:1 in f: /*script*/ {data} \\1" in content(page)["texts"]


def test_the_page_needs_no_network():
    page = html(*tables())
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://|<link|<img|\ssrc=|@import|url\((?!#)", page)


def test_only_generated_files_are_kept_and_long_ones_are_cut():
    report, graphs, _ = tables()
    sources = [{"kernels/a.cpp": "x" * 500_000, "00-captured.py": "def forward(): ..."}]
    found = content(html(report, graphs, sources))["graphs"][0]["sources"]
    assert list(found) == ["kernels/a.cpp"]
    assert len(found["kernels/a.cpp"]) < 401_000
    assert "all of it is in kernels/a.cpp" in found["kernels/a.cpp"]


def test_a_cost_is_kept_where_a_node_has_one():
    report, graphs, sources = tables(2)
    graphs[0]["nodes"][2]["bytes"] = 4096.0
    assert content(html(report, graphs, sources))["graphs"][0]["bytes"] == {"2": 4096.0}


def test_a_report_without_graphs_is_a_page():
    assert content(html({"version": 1, "graphs": []}, [], []))["graphs"] == []


def test_graphs_and_sources_go_together():
    report, graphs, _ = tables(2)
    with pytest.raises(ValueError):
        html(report, graphs, [])


def named(name, target):
    return {"name": name, "op": "call_function", "target": target, "value": "f32[2]", "line": ""}


def test_links_in_the_documentation_name_passes():
    text = (Path(__file__).parents[2] / "docs" / "page.md").read_text()
    named = set(re.findall(r"pass=([\w-]+)", text))
    assert named and named <= registered().keys()
