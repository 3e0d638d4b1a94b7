"""The pages of real models as they open: few boxes, small, quick, and without an error. Inductor is left out."""

from unittest import mock

import pytest
import torch
from torch import nn

import recompile
from recompile import backend

CROSS = "\N{MULTIPLICATION SIGN}"


class Tables(nn.Module):
    def __init__(self, count=1000):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(100 + k, 8) for k in range(count))
        self.tower = nn.Sequential(nn.Linear(8 * count, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids):
        return self.tower(torch.cat([table(ids[:, k]) for k, table in enumerate(self.tables)], 1))


def tables():
    return Tables(), (torch.zeros(16, 1000, dtype=torch.int64),)


def mmoe():
    pytest.importorskip("torch_rechub")
    from recompile.zoo import build

    built = build("rechub.MMOE", scale=0.001)
    return built.model, built.inputs(64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    with mock.patch.object(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward):
        for make in (tables, mmoe):
            torch._dynamo.reset()
            model, inputs = make()
            with recompile.dump(made / "dump"), torch.no_grad():
                torch.compile(model.eval(), backend="recompile")(*inputs)
            (made / "dump" / "index.html").rename(made / f"{make.__name__}.html")
    return made


# The boxes of the first screen, of both its sides, and some of them.
FIRST = {
    "tables": (16, {f"1000 {CROSS} embedding", "lookup", "cat"}),
    "mmoe": (50, {f"26 {CROSS} embedding", "lookup", f"8 {CROSS} experts.*.mlp"}),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_model_is_one_screen_and_opens_at_once(page, folder, name):
    most, some = FIRST[name]
    page.open(name)
    shown = page.boxes("before") + page.boxes("after")
    assert some <= set(shown) and len(shown) <= most
    spent = page.js(
        "const [t] = performance.getEntriesByType('navigation'); return t.loadEventEnd - t.responseEnd"
    )
    assert spent < 3000  # a third of a second where the machine is not busy
    assert (folder / f"{name}.html").stat().st_size < 5_000_000
    page.open(name, "pass=captured&node=output")
    assert page.selected() == ["output"]
