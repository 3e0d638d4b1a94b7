"""The loops of the backward over a row of pairs: P and dS in the place of s and g, and what extras' gradients need."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from recompile.lowering import score as language
from recompile.lowering.attention import cpp_gradients as gradients
from recompile.lowering.attention.cpp_pairs import Loop, masked
from recompile.lowering.attention.cpp_plan import Plan
from recompile.lowering.scalar import symbol


class Slopes:
    """The functions `pairs_kept`, `pairs_masked` and, under a softmax, `pairs_full` for rows computed from all keys.

    The latter get P from the row's maximum and sum instead of lse (cpp_backward_text.py has the reason).
    """

    def __init__(self, plan: Plan, keep: sympy.Basic, wanted: Sequence[str]) -> None:
        self.plan, self.spec, self.keep, self.wanted = plan, plan.spec, keep, wanted
        self.kept = plan.named(self.spec.kept or self.spec.score)
        self.full = plan.named(self.spec.score)
        self.weight = plan.named(self.spec.weight) if self.spec.weight else sympy.Integer(1)
        plan.split([self.kept, self.full, self.weight], keep)
        for name in plan.gathers:
            plan.index(name)
        self.targets = gradients.targets(plan, wanted, [self._chain(self.kept), self._chain(self.full)])
        self.slots = gradients.slots_of(plan, self.targets)
        self.by_row = ["delta", "top", "norm"] if self.spec.softmax else []
        kinds = ["kept", "masked", *(["full"] if self.spec.softmax else [])]
        self.loops = {kind: self._loop(kind) for kind in kinds}
        self.scores = plan.hoist(masked(sympy.true, self.full, -sympy.oo))

    def _chain(self, score: sympy.Basic) -> gradients.Chain:
        """The gradient by a symbol, from g and p."""
        g, p = symbol("g"), symbol("p")
        by_score = p * (g * self.weight - symbol("delta")) if self.spec.softmax else g

        def chain(by: sympy.Basic) -> sympy.Basic:
            through_weight = language.times(p * g, self.weight.diff(by)) if self.spec.softmax else 0
            return language.times(by_score, score.diff(by)) + through_weight

        return chain

    def _loop(self, kind: str) -> Loop:
        score = self.full if kind == "full" else self.kept
        chain, p = self._chain(score), symbol("p")
        scalars = {"lse": "t.lse[row * lse_m]", "delta": "t.delta[row]"}
        probability = sympy.exp(score - symbol("lse")) if self.spec.softmax else score
        if kind == "full":
            scalars |= {"lse": "t.top[row]", "norm": "t.norm[row]"}
            probability = probability * symbol("norm")
        stores = [
            ("s_[c] =", "float", self.plan.hoist(p * self.weight) if self.spec.softmax else p),
            ("g_[c] =", "float", self._shown(kind, chain(language.S))),
        ]
        for tile, target in gradients.tiles_of(self.targets).items():
            value = self._shown(kind, chain(symbol(target.name)))
            stores.append((f"{tile}_[c] {'+' * target.shared}=", "float", value))
        late = [name for name, is_shared in self.slots.items() if not is_shared]
        lets = [("p", self._shown(kind, probability))]
        return Loop(self.plan, {"s": "s_", "g": "g_"}, stores, scalars, lets, late)

    def _shown(self, kind: str, expr: sympy.Basic) -> sympy.Basic:
        mask = {"masked": self.keep, "full": sympy.true}.get(kind)
        return self.plan.hoist(expr if mask is None else masked(mask, expr, sympy.Integer(0)))

    def __str__(self) -> str:
        tiles = gradients.tiles_of(self.targets)
        arrays = "".join(f"\n    float* const {e}_ = t.{e} + (row - t.i0) * BN;" for e in tiles)
        written = self._scores() if self.spec.softmax else ""
        for kind, loop in self.loops.items():
            written += f"""
  void pairs_{kind}(const Tile& t, int64_t row, float* s_, float* g_, int64_t c0, int64_t c1, [[maybe_unused]] Bad& bad) const {{{arrays}{loop}
  }}"""
        return written

    def _scores(self) -> str:
        loop = Loop(self.plan, {"s": "s_"}, [("s_[c] =", "float", self.scores)])
        return f"""
  void scores_full(const Tile& t, int64_t row, float* s_, int64_t c0, int64_t c1, [[maybe_unused]] Bad& bad) const {{{loop}
  }}"""
