"""The first rewrite that changes the numbers, and the limit by which it is found."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import recompile
from recompile import cli
from recompile.errors import OptionError, RecompileError
from recompile.options import Options
from recompile.rewrite import Context, Pass, registry
from recompile.rewrite.limit import made


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.fixture
def wrong(monkeypatch):
    """A pass that swaps each tanh for a sigmoid, from the fourth on; the first three stay what they are."""

    @dataclass(frozen=True)
    class SwapTanh(Pass):
        def run(self, graph: fx.Graph, ctx: Context) -> None:
            nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
            for k, node in enumerate(nodes):
                ctx.tried(self.name())
                try:
                    ctx.begin(self.name(), node)
                except recompile.Refuse as refusal:
                    ctx.refuse(self.name(), refusal.why, refusal.at)
                    continue
                if k >= 3:
                    node.target = torch.ops.aten.sigmoid.default
                ctx.fired(self.name())

    recompile.registered()  # ours are known before
    monkeypatch.setitem(registry._known, "swap-tanh", SwapTanh)
    return {"passes": "swap-tanh"}


def test_the_first_wrong_rewrite_is_named_with_its_line(wrong):
    found = recompile.bisect(Model(), torch.randn(3, 4), options=wrong)
    assert (found.rewrite.rule, found.rewrite.node, found.number, found.rewrites) == (
        "swap-tanh",
        "tanh_3",
        4,
        6,
    )
    assert "x = layer(x).tanh()" in found.rewrite.line
    assert found.error > 1e-2 and found.before < 1e-6
    assert str(found).startswith(
        "Rewrite 4 of 6 changes the numbers: swap-tanh at node tanh_3\n  at test_bisect.py"
    )


def test_nothing_is_found_where_nothing_is_wrong():
    found = recompile.bisect(Model(), torch.randn(3, 4), train=True)
    assert found.rewrite is None and found.error < 1e-6
    assert str(found).startswith("Nothing was rewritten: the error is ")


def test_a_model_that_differs_without_rewrites(monkeypatch):
    monkeypatch.setattr("recompile.compare.error", lambda *_: 1.0)
    with pytest.raises(RecompileError, match="differs from eager without any rewrite"):
        recompile.bisect(Model(), torch.randn(3, 4))


def test_a_pass_that_is_not_counted_is_named_where_no_rewrite_explains_the_numbers(monkeypatch):
    @dataclass(frozen=True)
    class Silent(Pass):
        def run(self, graph: fx.Graph, ctx: Context) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
                node.target = torch.ops.aten.sigmoid.default
                ctx.fired(self.name())

    recompile.registered()
    monkeypatch.setitem(registry._known, "silent", Silent)
    with pytest.raises(RecompileError, match=r"without what never calls ctx\.begin.* is not counted: silent"):
        recompile.bisect(Model(), torch.randn(3, 4), options={"passes": "silent"})


def test_attention_with_dropout_is_said_to_be_left_alone():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.dropout((q @ k.mT).softmax(-1), 0.3, self.training) @ v

    found = recompile.bisect(Attention(), *torch.randn(3, 2, 5, 4), train=True)
    assert found.rewrite is None and "attention with dropout was not rewritten" in str(found)


WRONG = """
from dataclasses import dataclass
import recompile, torch

@recompile.register
@dataclass(frozen=True)
class SinForTanh(recompile.Rule):
    def pattern(self, op):
        return op.tanh(op.var("x"))

    def rewrite(self, m):
        return m.op.sin(m["x"])

class Model(torch.nn.Module):
    def forward(self, x):
        y = x.relu() * 2
        return y.tanh()

def wrong():
    return Model(), (torch.ones(3),)
"""


def test_the_command_names_the_rule_and_the_users_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_known", recompile.registered())
    (tmp_path / "with_a_wrong_rule.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["bisect", "with_a_wrong_rule:wrong"]) == 1
    said = capsys.readouterr().out
    assert "changes the numbers: sin-for-tanh at node tanh\n" in said
    assert "at with_a_wrong_rule.py:17 in forward: return y.tanh()" in said


@pytest.mark.parametrize("limit", [0, 2])
def test_the_limit_stops_every_pass(limit):
    """stack, square and attention: rewrites of several passes."""

    def model(q, k, v):
        v = torch.stack([v, v], 1)[:, 0]
        return ((q * q) @ k.mT).softmax(-1) @ v

    made.clear()
    report = recompile.explain(model, *torch.randn(3, 2, 5, 4), options={"rewrite_limit": limit})
    rules = [rule for entry in report.graphs[0].passes for rule in entry.rules]
    assert len(made) == limit == sum(rule.fired for rule in rules if rule.name != "dead-code")
    said = [refusal.why for rule in rules for refusal in rule.refused]
    assert f"the option rewrite_limit allows {limit} rewrite{'s' * (limit != 1)}" in said
    made.clear()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pases": "default"}, "unknown option 'pases'; did you mean 'passes'"),
        ({"passes": "default,fuse-lookup"}, "unknown pass 'fuse-lookup'; did you mean 'fuse-lookups'"),
    ],
)
def test_a_wrong_option_is_told_without_dynamos_words(options, says):
    with pytest.raises(OptionError, match=says):
        recompile.explain(torch.relu, torch.ones(2), options=options)


def test_the_environment_sets_the_limit(monkeypatch):
    monkeypatch.setenv("RECOMPILE_REWRITE_LIMIT", "7")
    assert Options.from_dict({}).rewrite_limit == 7
    monkeypatch.setenv("RECOMPILE_REWRITE_LIMIT", "few")
    with pytest.raises(OptionError, match="RECOMPILE_REWRITE_LIMIT is no number"):
        Options.from_dict({})
