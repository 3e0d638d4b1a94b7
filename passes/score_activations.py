"""Activation functions as expressions of the score language.

Where eager has a kink they are `where`s whose sides' derivatives are eager's gradients there.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import sympy

from recompile.lowering.score import erf, where

Expr: TypeAlias = sympy.Basic
_ZERO, _ONE, _TWENTY, _HALF = sympy.Integer(0), sympy.Integer(1), sympy.Integer(20), sympy.Rational(1, 2)


def relu(x: Expr) -> Expr:
    """0 below 0."""
    return where(x <= 0, _ZERO, x)


def leaky_relu(x: Expr, negative_slope: Expr) -> Expr:
    """A slope below 0."""
    return where(x > 0, x, x * negative_slope)


def hardtanh(x: Expr, min_val: Expr, max_val: Expr) -> Expr:
    """Clamped, with no gradient at the bounds; a clamp has one there."""
    return where(x <= min_val, min_val, where(x >= max_val, max_val, x))


def relu6(x: Expr) -> Expr:
    """Clamped to [0, 6]."""
    return hardtanh(x, _ZERO, sympy.Integer(6))


def hardsigmoid(x: Expr) -> Expr:
    """`relu6(x + 3) / 6`."""
    return where(x <= -3, _ZERO, where(x >= 3, _ONE, x / 6 + _HALF))


def hardswish(x: Expr) -> Expr:
    """`x * relu6(x + 3) / 6`; its gradient is 0 at -3 and 1 at 3."""
    return where(x <= -3, _ZERO, where(x >= 3, x, x * (x + 3) / 6))


def elu(x: Expr, alpha: Expr = _ONE, scale: Expr = _ONE, input_scale: Expr = _ONE) -> Expr:
    """An exponential below 0."""
    return where(x > 0, scale * x, scale * alpha * (sympy.exp(input_scale * x) - 1))


def celu(x: Expr, alpha: Expr) -> Expr:
    """`elu` of which the slope at 0 is 1."""
    return elu(x, alpha, _ONE, 1 / alpha)


def selu(x: Expr) -> Expr:
    """`elu` with the two numbers of self-normalizing networks, in float64 as PyTorch has them."""
    return elu(x, sympy.Float(1.6732632423543772), sympy.Float(1.0507009873554805))


def softplus(x: Expr, beta: Expr = _ONE, threshold: Expr = _TWENTY) -> Expr:
    """log(1 + exp(beta x)) / beta, and x itself above the threshold."""
    return where(beta * x > threshold, x, sympy.log(1 + sympy.exp(beta * x)) / beta)


def log_sigmoid(x: Expr) -> Expr:
    """log(sigmoid(x)), of the exponential that does not overflow."""
    return where(x < 0, x - sympy.log(1 + sympy.exp(x)), -sympy.log(1 + sympy.exp(-x)))


def mish(x: Expr) -> Expr:
    """`x * tanh(softplus(x))`."""
    return x * sympy.tanh(softplus(x))


def gelu(x: Expr) -> Expr:
    """x times the probability that a normal variable is below it."""
    return _HALF * x * (1 + erf(x * sympy.Float(math.sqrt(0.5))))


def gelu_by_tanh(x: Expr) -> Expr:
    """`gelu(x, approximate="tanh")`."""
    inner = sympy.Float(math.sqrt(2 / math.pi)) * (x + sympy.Float(0.044715) * x**3)
    return _HALF * x * (1 + sympy.tanh(inner))
