"""Fakes and contract tests for people who write a backend or a store of their own.

In: an implementation. Out: AssertionError that says which promise it breaks. May import everything below `runtime`.
"""

from ray_tracking.testing.backends import InMemoryBackend, Point, check_backend

__all__ = ["InMemoryBackend", "Point", "check_backend"]
