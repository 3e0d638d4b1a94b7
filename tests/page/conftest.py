"""One browser for all tests of the page; they are skipped where there is none."""

import shutil

import pytest

from recompile.page import html
from tests.page.graphs import HOSTILE, large, tables


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("needs chromium and chromedriver: Debian's packages chromium and chromium-driver")
    from tests.page.browser import start

    started = start(browser, driver, tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Pages of a model with 1,000 tables, of one with 4, of one with a hostile line, and of 5,000 nodes."""
    made = tmp_path_factory.mktemp("pages")
    # A browser's driver cannot hand over a lone surrogate; tests/unit/test_page.py has one.
    hostile = tables(4, HOSTILE.replace("\ud800", ""))
    dumps = {"tables": tables(1000), "few": with_costs(tables(4)), "hostile": hostile, "large": large()}
    dumps |= {
        "failed": failed(tables(4)),
        "several": both(tables(2), tables(8)),
        "measured": measured(tables(4)),
    }
    for name, dump in dumps.items():
        (made / f"{name}.html").write_text(html(*dump), encoding="utf-8")
    return made


def with_costs(dump):
    for k, node in enumerate(dump[1][0]["nodes"]):
        node["bytes"] = 10.0**k
    return dump


def measured(dump):
    """As after `explain(profile=True)`: a region's costs and time, and what the machine reaches."""
    report, (graph,), _ = dump
    for node in graph["nodes"]:
        layer = "linear" in node["target"]
        node |= {"bytes": 4096, "flops": 2e6 if layer else 0} if node["op"] == "call_function" else {}
    cost = {"bytes": "9290000", "flops": "1510000", "example_bytes": 9290000, "example_flops": 1510000}
    own = {"bytes": "90900*s0", "flops": "1060000", "example_bytes": 5817600, "example_flops": 1060000}
    report["graphs"][0]["ceilings"] = {"bytes": 1e10, "flops": 1e11}
    time = {"ms": 0.279, "bound": "memory", "reached": 0.52}
    report["graphs"][0]["regions"][0] |= {"before": cost, "after": own, "measured": time}
    return dump


def both(*dumps):
    """Several dumps of a graph as one."""
    reports, graphs, sources = zip(*dumps, strict=True)
    records = [report["graphs"][0] | {"index": k} for k, report in enumerate(reports)]
    numbered = [graph | {"index": k} for k, (graph,) in enumerate(graphs)]
    return {"version": 1, "graphs": records}, numbered, [files for (files,) in sources]


def failed(dump):
    """Twice the same graph: as one whose pass was undone, and as one that plain Inductor compiled."""
    report, (graph,), (sources,) = dump
    undone, skipped = report["graphs"][0]["passes"]
    undone["error"], skipped["skipped"] = "RecompileError: <b>x</b>", "its numerics are fast"
    refusal = {
        "why": "recompile has an internal error, <i>ValueError</i>",
        "node": "",
        "line": "model.py:1 in forward: x",
    }
    other = report["graphs"][0] | {"index": 1, "fallback": refusal, "passes": [], "regions": []}
    return {"version": 1, "graphs": [*report["graphs"], other]}, [graph, graph | {"index": 1}], [sources, {}]


@pytest.fixture
def page(chromium, folder):
    from tests.page.browser import Page

    chromium.get_log("browser")
    yield Page(chromium, folder)
    assert chromium.get_log("browser") == []  # no error of the script, nothing refused
