"""Fixtures of the tests of averaging."""

from tests.support.restored_runs import make

__all__ = ["make"]
