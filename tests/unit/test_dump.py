"""What a dump takes down, what it writes where, and what the commands say about it; Inductor stays out."""

import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import recompile
from recompile import Pass, backend, cli, dumping
from recompile.dump_read import read
from recompile.errors import CaptureError, RecompileError
from recompile.graph.nodes import source_name
from recompile.node_entry import entry
from recompile.recording import Recording
from recompile.report import GraphRecord, frame_line, user_line
from recompile.rewrite import registry


class Tower(nn.Module):
    """Four fields side by side, through a dropout, and one layer."""

    def __init__(self, dim=4):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, dim) for _ in range(4))
        self.top = nn.Linear(4 * dim, 2)

    def forward(self, ids):
        unused = ids + 1  # noqa: F841
        rows = torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        return self.top(nn.functional.dropout(rows.view(ids.shape[0], -1), 0.5, False))


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """No graph compiled before, and a compiler that runs the graph as it is."""
    torch._dynamo.reset()
    backend._warned.clear()
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)


def run(model=None, batch=5, **options):
    model = model or Tower().eval()
    torch._dynamo.reset()
    return torch.compile(model, backend="recompile", options=options)(
        torch.zeros(batch, 4, dtype=torch.int64)
    )


@pytest.fixture
def folder(tmp_path):
    """A dump of one graph."""
    with recompile.dump(tmp_path / "out") as out:
        run()
    return out


def graph_of(folder, index=0):
    return json.loads((folder / f"graph-{index}" / "graph.json").read_text())


def rewrites_of(graph, name):
    places = [k for k, stage in enumerate(graph["stages"]) if stage["pass"] == name]
    return [r for r in graph["rewrites"] if r["stage"] in places]


def test_the_folder_has_what_the_documentation_says(folder):
    assert {f.name for f in folder.iterdir()} == {"index.html", "report.json", "graph-0"}
    graph, files = graph_of(folder), {f.name for f in (folder / "graph-0").iterdir()}
    order = [stage["pass"] for stage in graph["stages"]]
    place = order.index("fuse-lookups")
    assert f"{place:02}-fuse-lookups.py" in (Path(__file__).parents[2] / "docs" / "dump.md").read_text()
    wanted = {"graph.json", "inputs.json", "regions.json", "00-captured.py", f"{place:02}-fuse-lookups.py"}
    assert wanted | {f"{place:02}-fuse-lookups.diff"} <= files
    unchanged = order.index("pool-sequences")
    assert not any(name.startswith(f"{unchanged:02}") for name in files)
    assert graph["stages"][unchanged]["order"] == graph["stages"][unchanged - 1]["order"]


def test_the_report_of_a_dump_is_numbered_as_its_folders(folder, tmp_path):
    with recompile.dump(tmp_path / "other") as other:
        run()
        run(Tower(8).eval())
    report = read(other).report
    assert [graph.index for graph in report.graphs] == [0, 1]
    assert recompile.Report.from_json(report.to_json()) == report
    with pytest.raises(RecompileError, match="another version"):
        recompile.Report.from_json('{"version": 0, "graphs": []}')


def test_a_stage_reads_like_the_model(folder):
    text = (folder / "graph-0" / "00-captured.py").read_text()
    assert "# graph 0, captured: " in text
    assert ": f32[20, 4],  # self.tables.0.weight" in text
    assert "in forward: rows = torch.cat([table(ids[:, i])" in text
    assert "cat: f32[5, 16] = aten.cat.default([embedding, embedding_1, embedding_2, embedding_3], 1)" in text


def test_nodes_have_their_bytes_and_operations(folder):
    layers = [node for node in graph_of(folder)["nodes"] if node["target"] == "aten.linear.default"]
    assert {(node["bytes"], node["flops"]) for node in layers} == {(4 * (80 + 32 + 2 + 10), 2 * 16 * 10)}


def test_rewrites_say_what_became_what(folder):
    graph = graph_of(folder)
    (fused,) = rewrites_of(graph, "fuse-lookups")
    assert fused["rule"] == "fuse-lookups"
    assert {"embedding", "embedding_3", "cat"} <= set(fused["old"])
    assert {"lookup_default", "getitem"} <= set(fused["new"])
    dropped = [r for r in rewrites_of(graph, "canonicalize") if r["rule"] == "drop-no-op"]
    assert [r["old"] for r in dropped][-1] == ["dropout"]
    (dead,) = rewrites_of(graph, "dead-code")
    assert dead["old"] and dead["new"] == []


def test_every_rewrite_is_between_its_two_stages(folder):
    graph = graph_of(folder)
    names = [{graph["nodes"][n]["name"] for n in stage["order"]} for stage in graph["stages"]]
    for rewrite in graph["rewrites"]:
        before, after = names[rewrite["stage"] - 1], names[rewrite["stage"]]
        assert set(rewrite["old"]) <= before and set(rewrite["new"]) <= after
    gone = {n for before, after in pairwise(names) for n in before - after}
    assert gone == {n for r in graph["rewrites"] for n in r["old"] if n not in names[r["stage"]]}


def test_nodes_made_without_a_builder_have_the_rule_of_their_pass(folder):
    nodes = {node["name"]: node for node in graph_of(folder)["nodes"]}
    assert nodes["lookup_default"]["rule"] == nodes["getitem"]["rule"] == "fuse-lookups"
    assert nodes["embedding"]["rule"] == ""


@dataclass(frozen=True)
class Twice(Pass):
    """relu -> tanh -> sigmoid, by hand; then it may fail."""

    after = ("fuse-lookups",)
    fails: bool = False

    def run(self, graph, ctx):
        node = next(n for n in graph.nodes if "linear" in n.name)
        for target in (torch.ops.aten.tanh.default, torch.ops.aten.sigmoid.default):
            with graph.inserting_after(node):
                new = graph.call_function(target, (node.args[0],))
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            node = new
        if self.fails:
            raise ValueError("oops")


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.top = nn.Linear(4, 4)

    def forward(self, ids):
        return self.top(ids.float())


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_of_yours_is_taken_down_unless_it_was_undone(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(registry._known, "twice", Twice)
    with recompile.dump(tmp_path) as out:
        run(Square(), passes=f"twice{{fails={str(fails).lower()}}}", verify="none")
    graph = graph_of(out)
    before, after = (stage["order"] for stage in graph["stages"])
    if fails:
        assert after == before and graph["rewrites"] == []
    else:
        assert graph["rewrites"] == [
            {"stage": 1, "rule": "twice", "old": ["linear"], "new": ["sigmoid_default"]}
        ]


def entries(model, *inputs):
    gm = torch.fx.symbolic_trace(model)
    return {node.name: entry(node) for node in gm.graph.nodes}


def test_calls_are_one_line_of_python():
    found = entries(lambda x, y: (x.sum(dim=(0, 1)), torch.cat([x, y], dim=0), {"a": x[1:, None]}))
    assert found["sum_1"]["text"] == "x.sum(dim=(0, 1))"
    assert found["cat"]["text"] == "torch.cat([x, y], dim=0)" and found["cat"]["inputs"] == ["x", "y"]
    assert found["getitem"]["text"] == "operator.getitem(x, (slice(1, None, None), None))"
    assert found["output"]["text"] == "return (sum_1, cat, {'a': getitem})"


@pytest.mark.parametrize(
    ("guarded", "shown"),
    [
        ("L['self']._modules['top']._modules['0']._parameters['weight']", "self.top.0.weight"),
        ("L['x']['age']", "x['age']"),
        ("G['scale']", "scale"),
    ],
)
def test_places_are_written_as_in_the_model(guarded, shown):
    assert source_name(guarded) == shown


def test_symbolic_sizes_are_text_and_regions_have_an_example(tmp_path):
    ids = torch.zeros(5, 4, dtype=torch.int64)
    torch._dynamo.mark_dynamic(ids, 0)
    with recompile.dump(tmp_path) as out:
        torch.compile(Tower().eval(), backend="recompile")(ids)
    inputs = {x["name"]: x for x in json.loads((out / "graph-0" / "inputs.json").read_text())}
    size, width = inputs["l_ids_"]["shape"]
    assert isinstance(size, str) and size.startswith("s") and width == 4
    ((region,),) = (json.loads((out / "graph-0" / "regions.json").read_text()),)
    assert {tuple(x["shape"]) for x in region["args"][1]} == {(5,)}
    assert f"f32[{size}, 16]" in (out / "graph-0" / "00-captured.py").read_text()


def test_a_graph_that_cannot_be_captured_is_shown_as_dynamo_gave_it(tmp_path, monkeypatch):
    def refuse(gm):
        raise CaptureError("it holds a black box.")

    monkeypatch.setattr(backend, "capture", refuse)
    with recompile.dump(tmp_path) as out, pytest.warns(UserWarning, match="black box"):
        run()
    (stage,) = graph_of(out)["stages"]
    assert stage["pass"] == "captured" and stage["order"] and (out / "index.html").exists()
    assert "torch.nn.functional.embedding" in (out / "graph-0" / "00-captured.py").read_text()


def test_a_graph_that_inductor_fails_on_is_written_and_its_error_is_kept(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("of Inductor")

    monkeypatch.setattr(backend, "compile_fx", fail)
    with recompile.dump(tmp_path) as out, pytest.raises(Exception, match="KeyError: 'of Inductor'"):
        run(Square())
    assert graph_of(out)["stages"]


def test_the_option_and_the_variable_name_a_folder(tmp_path, monkeypatch):
    run(dump=tmp_path / "option")
    monkeypatch.setenv("RECOMPILE_DUMP", str(tmp_path / "variable"))
    run()
    with recompile.dump(tmp_path / "block"):
        run(dump=str(tmp_path / "option"))
    found = {name: len(list((tmp_path / name).glob("graph-*"))) for name in ("option", "variable", "block")}
    assert found == {"option": 1, "variable": 1, "block": 1}
    assert (tmp_path / "option" / "index.html").exists()


def test_nothing_is_taken_down_without_a_dump(monkeypatch):
    def never(*_):
        raise AssertionError("it was taken down")

    monkeypatch.setattr(Recording, "__init__", never)
    run()


def test_a_fresh_run_replaces_the_older_dump_and_nothing_else(folder):
    (folder / "mine.txt").write_text("kept")
    (folder / "graph-0" / "notes.md").write_text("kept")
    stale = folder / "graph-7" / "kernels" / "lookup.cpp"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    with recompile.dump(folder):
        pass
    assert not stale.parent.parent.exists()
    assert {f.name for f in (folder / "graph-0").iterdir()} == {"notes.md"}
    assert {f.name for f in folder.iterdir()} == {"mine.txt", "graph-0", "report.json", "index.html"}


def test_another_process_has_a_folder_of_its_own(folder):
    script = f"""
import recompile
with recompile.dump({str(folder)!r}) as mine:
    print(mine)
"""
    with recompile.dump(folder):
        run()
        found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert found.stdout.strip().startswith(f"{folder}{os.sep}process-")
        assert len(read(folder).graphs) == 1
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(folder)


def test_threads_number_their_graphs_in_turn(tmp_path):
    failures = []

    def work(dim):
        try:
            with recompile.dump(tmp_path):
                torch.compile(Tower(dim), backend="recompile")(torch.zeros(5, 4, dtype=torch.int64))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(dim,)) for dim in (3, 4, 5)]
    with recompile.dump(tmp_path):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    dump = read(tmp_path)
    assert [(g["index"], g["stages"][0]["pass"]) for g in dump.graphs] == [(k, "captured") for k in range(3)]
    assert all(dump.regions(k) for k in range(3))


def test_a_bad_folder_is_a_warning_that_names_it_and_an_error_under_strict(tmp_path):
    (tmp_path / "file").write_text("")
    bad = str(tmp_path / "file" / "out")
    with pytest.warns(UserWarning, match=f"the dump to {bad} failed: NotADirectoryError"):
        assert run(dump=bad).shape == (5, 2)
    with pytest.raises(Exception, match=r"StrictError: the dump to .* failed"):
        run(dump=bad, strict=True)
    with pytest.raises(RecompileError, match="no dump can be written"), recompile.dump(bad):
        pass


def test_a_folder_that_vanishes_costs_no_compilation(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("recompile.dump_folder.files", fail)
    with recompile.dump(tmp_path), pytest.warns(UserWarning, match="disk full"):
        assert run().shape == (5, 2)


def test_many_graphs_write_the_page_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "recompile.page.html", lambda report, graphs, sources: written.append(len(graphs)) or ""
    )
    folder = dumping._open(tmp_path)
    for _ in range(35):
        empty = Recording(GraphRecord(), "", strict=False)
        empty.stages = [{"pass": "captured", "ms": 0.0, "order": []}]
        folder.add(empty, strict=True)
    dumping._leave(folder)
    assert written == [*range(1, 17), 32, 35]


def out_of(capsys, *args):
    status = cli.main([str(arg) for arg in args])
    return status, capsys.readouterr()


def test_show_tells_which_graph_matters(tmp_path, capsys):
    with recompile.dump(tmp_path):
        run(Square())
        run()
    status, shown = out_of(capsys, "show", tmp_path)
    assert status == 0 and "graph 1: forward test_dump.py:" in shown.out
    assert "lookup_default: 4 lookups over 4 tables -> concat" in shown.out
    assert "1 x fuse-lookups" in shown.out
    assert "graph 0: forward" in out_of(capsys, "show", tmp_path, "--graph", 0)[1].out
    graphs = json.loads(out_of(capsys, "show", tmp_path, "--json")[1].out)
    assert [len(graph["regions"]) for graph in graphs] == [0, 1]
    assert graphs[1]["stages"][0]["pass"] == "captured"


def test_diff_shows_one_pass_or_all(folder, capsys, monkeypatch):
    status, shown = out_of(capsys, "diff", folder, "--pass", "fuse-lookups")
    assert status == 0 and "+++ " in shown.out and "-    embedding: f32[5, 4]" in shown.out
    everything = out_of(capsys, "diff", folder)[1].out
    assert shown.out in everything and "dead-code" in everything
    found = json.loads(out_of(capsys, "diff", folder, "--json")[1].out)
    assert ["\n".join(each["diff"]) + "\n" for each in found if each["pass"] == "fuse-lookups"] == [shown.out]
    assert "dead-code" in [each["pass"] for each in found]
    assert "\x1b[" not in everything
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in out_of(capsys, "diff", folder)[1].out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in out_of(capsys, "diff", folder)[1].out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["diff", "--pass", "fuse-lookup"], "unknown pass 'fuse-lookup'; did you mean 'fuse-lookups'?"),
        (["diff", "--pass", "fuse"], "did you mean 'fuse-lookups'?"),
        (["diff", "--pass", "pool-sequences"], "pass pool-sequences left graph 0 as it was"),
        (["diff", "--graph", "3"], "has no graph 3\n  expected: 0 to 0"),
        (["repro", "lookup"], "unknown region 'lookup'; did you mean 'lookup_default'?"),
    ],
)
def test_what_is_not_there_is_named(folder, capsys, args, sentence):
    status, shown = out_of(capsys, args[0], folder, *args[1:])
    assert status == 2 and sentence in shown.err


def test_commands_on_a_folder_without_a_dump_say_so(tmp_path, capsys):
    for command in ("show", "diff", "explain"):
        status, shown = out_of(capsys, command, tmp_path)
        assert status == 2 and "holds no dump" in shown.err


def test_explain_reads_a_dump(folder, capsys):
    status, shown = out_of(capsys, "explain", folder)
    assert status == 0 and "4 lookups over 4 tables -> concat" in shown.out
    assert json.loads(out_of(capsys, "explain", folder, "--json")[1].out)["graphs"]
    status, shown = out_of(capsys, "explain", folder, "--profile")
    assert status == 2 and "a dump cannot be measured" in shown.err
    assert "try: recompile explain package.module:function --profile" in shown.err


def test_importing_recompile_does_not_import_dynamo():
    script = "import sys, recompile; assert 'torch._dynamo' not in sys.modules; recompile.dump"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_dump_warns_about_nothing(tmp_path):
    with warnings.catch_warnings(), recompile.dump(tmp_path):
        warnings.filterwarnings("error", message="recompile")
        run()


def test_a_skipped_pass_is_no_stage(tmp_path):
    with recompile.dump(tmp_path) as out:
        run(numerics="exact")
    graph = graph_of(out)
    assert "fuse-lookups" not in {stage["pass"] for stage in graph["stages"]}


def test_lines_of_the_zoo_are_a_users_and_those_of_recompile_are_not():
    import recompile.zoo.dlrm

    def node_from(path):
        node = torch.fx.Graph().placeholder("x")
        node.meta["stack_trace"] = f'File "{path}", line 7, in forward\n    return x'
        return node

    assert user_line(node_from(recompile.zoo.dlrm.__file__)) == "dlrm.py:7 in forward: return x"
    assert frame_line(node_from(recompile.zoo.dlrm.__file__)) == "forward dlrm.py:7"
    assert user_line(node_from(backend.__file__)) == frame_line(node_from(torch.__file__)) == ""
