"""The documentation runs: its Python blocks, its commands, its links, and the refusals that it quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from recompile import report
from recompile.cli import _parser
from recompile.rewrite.registry import _known, registered

ROOT = Path(__file__).parents[2]
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}

# What a page takes for granted: a model of the reader's, and a batch for it.
MODEL = """
import torch
import recompile
model = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 8), torch.nn.Linear(8, 1))
batch = torch.randint(0, 50, (4, 3))
inputs = (batch,)
"""
SETUP = {
    "README.md": MODEL,
    "docs/options.md": MODEL,
    "docs/dump.md": MODEL,
    "docs/not-faster.md": MODEL,
    "docs/reporting-a-bug.md": MODEL,
    "docs/gpu.md": "import triton\nimport triton.language as tl",
}


def blocks(page: str, language: str) -> list[str]:
    """The page's fenced blocks, each behind as many newlines as stand before it: errors name the page's line."""
    text = PAGES[page].read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in found]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to write to, and passes that are registered in a page are gone after it."""
    monkeypatch.chdir(tmp_path)
    before = registered()
    torch._dynamo.reset()
    yield
    _known.clear()
    _known.update(before)
    torch._dynamo.reset()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_its_python_blocks_run(page, alone):
    namespace = {"__name__": "page"}
    exec(SETUP.get(page, ""), namespace)
    for block in blocks(page, "python"):
        exec(compile(block, str(PAGES[page]), "exec", dont_inherit=True), namespace)


def commands(page: str) -> Iterator[str]:
    """The names after `recompile` at the start of a line of an indented block, or of inline code."""
    text = PAGES[page].read_text()
    for line in re.findall(r"^    recompile (.+)$|`recompile ([^`]+)`", text, re.MULTILINE):
        command = "".join(line).partition("  ")[0]
        yield from (part.strip().removeprefix("recompile ").split()[0] for part in command.split("|"))


def test_its_commands_exist():
    known = next(action.choices for action in _parser()._actions if action.choices)
    named = {(page, command) for page in PAGES for command in commands(page)}
    assert {"explain", "bench", "show", "diff", "repro"} <= {command for _, command in named}
    assert not {(page, command) for page, command in named if command not in known}


def test_its_links_lead_somewhere():
    missing = []
    for page, path in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if not link.startswith("http") and not (path.parent / link).exists():
                missing.append((page, link))
    assert not missing


def sentences() -> list[re.Pattern[str]]:
    """Every string in the code that rewrites graphs, as a pattern: what is filled in may be anything."""
    files = [*(ROOT / "passes").glob("*.py"), *(ROOT / "recompile" / "rewrite").glob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    parts = [getattr(n, "values", [n]) for n in nodes if isinstance(n, ast.JoinedStr | ast.Constant)]
    texts = [[p.value if isinstance(p, ast.Constant) else None for p in part] for part in parts]
    said = [text for text in texts if sum(len(p) for p in text if isinstance(p, str)) > 6]
    return [re.compile("".join(".+" if p is None else re.escape(str(p)) for p in text)) for text in said]


def quoted(page: str) -> list[str]:
    """The sentences in backquotes in the list under "When it refuses"."""
    section = re.search(r"^## When it refuses\n(.*?)(?=^## |\Z)", PAGES[page].read_text(), re.M | re.S)
    items = re.findall(r"^- .*(?:\n  .*)*", section[1], re.MULTILINE) if section else []
    code = [text for item in items for text in re.findall(r"`([^`]+)`", item)]
    return [text for text in code if text.count(" ") > 1 and not text.startswith("...")]


@pytest.mark.parametrize("page", [page for page in PAGES if "## When it refuses" in PAGES[page].read_text()])
def test_its_refusals_are_those_of_the_code(page):
    known = sentences()
    assert quoted(page)
    assert not [text for text in quoted(page) if not any(p.fullmatch(text) for p in known)]


def test_every_field_of_the_report_is_documented():
    records = [c for c in vars(report).values() if is_dataclass(c) and c.__module__ == report.__name__]
    rows = re.findall(r"^\| (`[A-Z]\w+\..*?) \|", PAGES["docs/dump.md"].read_text(), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    assert sorted(documented) == sorted(f"{c.__name__}.{f.name}" for c in records for f in fields(c))


def test_every_pass_has_a_page():
    from recompile.passes import __all__

    assert {name.replace("_", "-") for name in __all__} == {
        Path(page).stem for page in PAGES if page.startswith("docs/passes/")
    }
