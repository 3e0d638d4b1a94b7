"""Ends what takes too long."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN_S = 0.5  # an exception that is raised in a finalizer or a callback from C++ gets lost


class Overtime(BaseException):
    """Time is up. No `Exception`: compilers, this one too, answer those with another way to compile."""


class TooSlow(Exception):
    """A variant took longer than it may. It is not just left out: Inductor, interrupted, may be broken from then on."""

    def __init__(self, variant: str, why: str) -> None:
        super().__init__(variant, why)
        self.variant, self.why = variant, why


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `Overtime` inside after so many seconds; main thread only, and not while C++ runs.

    Raises:
        Overtime: what is inside took longer.
    """

    def ring(number: int, frame: object) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
