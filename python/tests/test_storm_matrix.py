"""The workload matrix: loss and every gradient over 20 steps, by ``torch.equal``, offloaded against not.

The baseline is first held against itself: a workload that does not repeat its own bits shows nothing.
Distributed workloads are in ``test_storm_distributed``; that this matrix can fail is shown in
``test_storm_harness``.
"""

from __future__ import annotations

import functools

import pytest
from storm_harness import Run, devices, first_difference, offload_everything, train
from workloads import BUILDERS

NAMES = list(BUILDERS)


@functools.cache
def baseline(name: str, device: str) -> Run:
    """The keep-all run of ``name``, after a second one gave the same bits."""
    run = train(name, device=device)
    difference = first_difference(run, train(name, device=device))
    assert difference is None, f"the baseline does not repeat itself: {difference}"
    return run


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_the_same(name: str, device: str) -> None:
    """Everything that may leave the device leaves it."""
    run = train(name, offload_everything, device=device)
    assert first_difference(baseline(name, device), run) is None
    run.context.close()
    report = run.context.report()
    if (name, device) != ("lstm", "cuda"):  # its room holds more than its workspace
        assert report["units"]["kept"] == 0
    assert report["flows"]["offload"]["bytes"] > 0
    assert report["pool"]["bytes_in_use"] == 0
