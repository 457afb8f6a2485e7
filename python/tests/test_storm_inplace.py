"""A write after save ends under STORM as it ends without: in the same error, or in the same gradients."""

from __future__ import annotations

import functools

import pytest
from inplace_cases import CASES, Case, outcome
from storm_harness import keep_everything, offload_everything

from overspill import Storm


@pytest.mark.parametrize("wrap", [offload_everything, keep_everything])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_outcome_is_autograds(case: Case, wrap: functools.partial[Storm]) -> None:
    """Whether the tensor left or stayed."""
    plain = outcome(case, None)
    assert "modified by an inplace operation" in plain
    assert outcome(case, wrap) == plain


@pytest.mark.parametrize("wrap", [offload_everything, keep_everything])
def test_a_removed_version_check_is_seen(
    monkeypatch: pytest.MonkeyPatch, wrap: functools.partial[Storm]
) -> None:
    """Planted: without the check the same cases end in gradients, right or wrong, and no error."""
    monkeypatch.setattr("overspill._saved.Saved.check_version", lambda saved: None)
    for case in CASES:
        assert outcome(case, wrap) != outcome(case, None)
