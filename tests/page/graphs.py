"""Dumps made by hand: a model with many tables whose lookups a pass fuses, and a large random graph."""

import random

HOSTILE = "model.py:7 in forward: s = \"</script><script>alert('x')</script>\"  # <!-- é 表 \u2028 & \ud800"
KERNEL = """// region lookup_default
#include <cstdint>
void lookup(const float* table, int64_t n) {
    for (int64_t i = 0; i < n; ++i) use(table[i], "a < b");  // </script>
}
"""


class Recorder:
    """Collects nodes and stages in the form of graph.json."""

    def __init__(self, title):
        self.graph = {"version": 1, "index": 0, "title": title, "nodes": [], "stages": [], "rewrites": []}

    def node(self, name, target, inputs=(), value="f32[64, 16]", line="", module="", **more):
        op = "call_function" if "." in target else "placeholder"
        if target == "output":
            op = "output"
        text = f"{target}({', '.join(inputs)})"
        entry = {"name": name, "op": op, "target": target, "inputs": list(inputs), "text": text}
        entry |= {"value": value, "line": line, "module": module, "rule": "", "kernel": ""}
        self.graph["nodes"].append(entry | more)
        return len(self.graph["nodes"]) - 1

    def stage(self, name, order, ms=1.0):
        self.graph["stages"].append({"pass": name, "ms": ms, "order": list(order)})

    def report(self, refused=()):
        passes = [self._pass(stage["pass"], refused) for stage in self.graph["stages"][1:]]
        region = {"name": "lookup_default", "op": "recompile.lookup.default", "tables": 2}
        region |= {"summary": "bags -> concat", "lines": ["model.py:5 in forward: e = t(x)"]}
        record = {"index": 0, "nodes_before": 9, "nodes_after": 9, "capture_ms": 1.0, "passes": passes}
        return {"version": 1, "graphs": [record | {"regions": [region], "fallback": None}]}

    @staticmethod
    def _pass(name, refused):
        rule = {"name": name, "tried": 3, "fired": 2, "refused": list(refused)}
        record = {"name": name, "numerics": "exact", "nodes_before": 9, "nodes_after": 9, "ms": 1.0}
        return record | {"rules": [rule], "error": "", "skipped": ""}


def tables(count=26, line="model.py:5 in forward: e = [t(i) for t, i in zip(self.tables, ids)]"):
    """A model with `count` tables, captured, after a pass that changes nothing, and after one that fuses.

    Returns:
        The report, the graphs, and the generated sources, as `recompile.page.html` takes them.
    """
    made = Recorder("Model.forward model.py:5")
    node, wholes, ids, embedded = made.node, [], [], []
    for k in range(count):
        name = f"l_self_modules_tables_modules_{k}_parameters_weight_"
        wholes.append(node(name, name.upper(), value=f"f32[{100 + k}, 16]"))
        ids.append(node(f"l_ids_{k}_", f"L_ids_{k}_", value="i64[64]"))
        embedded.append(
            node(
                f"embedding_{k}",
                "aten.embedding.default",
                [name, f"l_ids_{k}_"],
                line=line,
                module=f"L['self'].tables.{k}",
            )
        )
    inputs = [f"embedding_{k}" for k in range(count)]
    cat = node("cat", "aten.cat.default", inputs, f"f32[64, {16 * count}]", "model.py:6 in forward: cat(e)")
    tail, end = _tower(node, "cat")
    captured = [*wholes, *ids, *embedded, cat, *tail, end]
    made.stage("captured", captured, 12.5)
    made.stage("canonicalize", captured, 3.0)
    fused = node("lookup_default", "recompile.lookup.default", [f"l_ids_{k}_" for k in range(count)])
    made.graph["nodes"][fused] |= {"rule": "fuse-lookups", "kernel": "kernels/lookup.cpp", "line": line}
    item = node("getitem", "_operator.getitem", ["lookup_default"], f"f32[64, {16 * count}]")
    first = node("linear_0", "aten.linear.default", ["getitem"], module="L['self'].tower.0")
    made.stage("fuse-lookups", [*wholes, *ids, fused, item, first, *tail[1:], end], 7.0)
    rewrite = {
        "stage": 2,
        "rule": "fuse-lookups",
        "old": [*inputs, "cat"],
        "new": ["lookup_default", "getitem"],
    }
    made.graph["rewrites"].append(rewrite)
    refusal = {
        "why": "fewer than 2 lookups to fuse",
        "node": "relu_0",
        "line": "model.py:9 in forward: relu(x)",
    }
    return made.report([refusal]), [made.graph], [{"kernels/lookup.cpp": KERNEL, "00-captured.py": "x"}]


def _tower(node, source):
    """Two layers and the output."""
    found = []
    for k in range(2):
        found.append(node(f"linear_{k}", "aten.linear.default", [source], module=f"L['self'].tower.{2 * k}"))
        source = f"relu_{k}"
        found.append(
            node(
                source,
                "aten.relu.default",
                [f"linear_{k}"],
                module=f"L['self'].tower.{2 * k + 1}",
                line="model.py:9 in forward: relu(x)",
            )
        )
    return found, node("output", "output", [source], "")


def large(count=5000, stages=8, seed=0):
    """A random graph of `count` nodes; every stage replaces a twentieth of the calls by others."""
    made, chance = Recorder("Large.forward model.py:1"), random.Random(seed)
    order = [made.node(f"x_{k}", f"X_{k}") for k in range(20)]
    for k in range(count - 21):
        inputs = [made.graph["nodes"][chance.choice(order[-60:])]["name"] for _ in range(2)]
        target = chance.choice(
            ["aten.add.Tensor", "aten.mul.Tensor", "aten.linear.default", "aten.cat.default"]
        )
        line = f"model.py:{k % 400} in forward: x = x + {k % 400}"
        order.append(made.node(f"n_{k}", target, inputs, line=line, module=f"L['self'].blocks.{k // 100}"))
    order.append(made.node("output", "output", [made.graph["nodes"][order[-1]]["name"]], ""))
    made.stage("captured", order)
    for stage in range(1, stages):
        order = [_other(made, i, stage) if chance.random() < 0.05 else i for i in order]
        made.stage(f"pass-{stage}", order)
    return made.report(), [made.graph], [{}]


def _other(made, index, stage):
    old = made.graph["nodes"][index]
    made.graph["nodes"].append(old | {"text": f"{old['text']}  # {stage}"})
    return len(made.graph["nodes"]) - 1
