"""What pass authors write with."""

from .rule import Context, Pass, Refuse, register, registered

__all__ = ["Context", "Pass", "Refuse", "register", "registered"]
