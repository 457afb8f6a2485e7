"""Djinn: more inference sessions than the device holds; each pauses at any layer and comes back exact."""

from .cache import SessionCache
from .pool import SessionPool
from .session import Break, Generated, Ongoing, Output, Paused, Session

__all__ = ["Break", "Generated", "Ongoing", "Output", "Paused", "Session", "SessionCache", "SessionPool"]
