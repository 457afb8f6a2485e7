"""That the matrix can see: it passes with a slow exact twin of STORM, and fails with every planted fault."""

from __future__ import annotations

import functools

import pytest
from inplace_cases import CASES, outcome
from storm_harness import FAULTS, NaiveStorm, first_difference, train

QUICK = ("mlp", "masks", "views", "custom_function", "many_forwards", "inplace")


@functools.cache
def differences(fault: str | None) -> list[str]:
    """The quick workloads that do not come out the same under the twin with ``fault``."""
    found = []
    for name in QUICK:
        try:
            run = train(name, functools.partial(NaiveStorm, fault=fault), steps=3)
        except (RuntimeError, IndexError, AssertionError):
            found.append(name)
        else:
            found += [name] if first_difference(train(name, steps=3), run) else []
    return found


def test_the_exact_twin_passes() -> None:
    """Copying every storage to bytes and back changes no bit."""
    assert differences(None) == []


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "version_unchecked"])
def test_a_planted_fault_is_seen(fault: str) -> None:
    """Each fault changes at least one workload."""
    assert differences(fault)


def test_a_missing_version_check_is_seen() -> None:
    """Without the check, what autograd refuses would go through with the wrong gradient, or the stale one."""
    for case in CASES:
        plain = outcome(case, None)
        assert outcome(case, NaiveStorm) == plain
        assert outcome(case, functools.partial(NaiveStorm, fault="version_unchecked")) != plain
