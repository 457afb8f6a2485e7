"""What STORM holds, and that it lets go: abandoned graphs, exceptions, re-entry, nesting, threads, cycles.

The counters of the pool and the number of live units are the witnesses; storages are watched by weak
references, since a leak through C++ (a node that holds its own output) is invisible to the collector.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from storm_harness import keep_everything, offload_everything
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from overspill import Storm

WIDTH = 64


def small_model() -> nn.Module:
    """Layers whose nodes save inputs and outputs both."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
    )


def batch(seed: int = 1) -> Tensor:
    """A batch for it."""
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Gradients of a fresh backward."""
    model.zero_grad()
    loss().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_empty(storm: Storm) -> None:
    """Nothing saved is left anywhere."""
    gc.collect()
    storm.close()
    report = storm.report()
    assert report["live_units"] == 0
    assert report["held_bytes"] == 0
    assert report["pool"]["bytes_in_use"] == 0
    assert report["disk_bytes"] == 0


@pytest.mark.parametrize("wrap", [offload_everything, keep_everything])
def test_an_abandoned_graph_is_freed_without_the_collector(wrap: Callable[..., Any]) -> None:
    """No cycle through a node: dropping the output is enough, for every op that saves its own output."""
    gc.disable()
    try:
        for op in (torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, lambda x: x.softmax(-1), torch.relu):
            with wrap(small_model()) as storm:
                for _ in range(3):
                    x = batch().abs().requires_grad_()
                    y = op(x + 1)
                    watched = StorageWeakRef(y.untyped_storage())
                    loss = (y * y).sum()
                    del y, loss
                    storm.close()
                    storm.report()
                    assert watched.expired()
                    assert storm.report()["live_units"] == 0
    finally:
        gc.enable()


def test_an_exception_in_forward_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that dies half way, then one that does not."""
    model, x = small_model(), batch()
    expected = gradients(model, lambda: model(x).sum())

    def broken(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with offload_everything(model) as storm:
        monkeypatch.setattr(model[4], "forward", broken)
        with pytest.raises(ZeroDivisionError):
            model(x)
        monkeypatch.undo()
        assert all(map(torch.equal, expected, gradients(model, lambda: model(x).sum())))
    assert_empty(storm)


def test_an_exception_in_backward_leaves_nothing() -> None:
    """A hook raises when half of what was saved has been brought back and more is on its way."""
    model, x = small_model(), batch()
    expected = gradients(model, lambda: model(x).sum())

    def broken(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with offload_everything(model) as storm:
        for _ in range(3):
            middle = model[:3](x)
            middle.register_hook(broken)
            with pytest.raises(ZeroDivisionError):
                model[3:](middle).sum().backward()
            del middle
            gc.collect()
            assert storm.report()["live_units"] == 0
        assert all(map(torch.equal, expected, gradients(model, lambda: model(x).sum())))
    assert_empty(storm)


def test_an_exception_leaves_the_context_and_the_hooks() -> None:
    """After the ``with`` statement nothing is packed any more, however it was left."""
    model = small_model()
    storm = offload_everything(model)
    with pytest.raises(ZeroDivisionError), storm:
        raise ZeroDivisionError
    model(batch()).sum().backward()
    assert sum(storm.report()["units"].values()) == 0
    assert_empty(storm)


def test_backward_after_the_context() -> None:
    """A graph built inside may be used outside, and after ``close``."""
    model, x = small_model(), batch()
    expected = gradients(model, lambda: model(x).sum())
    storm = offload_everything(model)

    def loss() -> Tensor:
        with storm:
            out = model(x).sum()
        storm.close()
        return out

    assert all(map(torch.equal, expected, gradients(model, loss)))
    assert_empty(storm)


def test_a_graph_outlives_the_last_reference_to_its_storm() -> None:
    """The graph keeps alive what it needs."""
    model, x = small_model(), batch()
    expected = gradients(model, lambda: model(x).sum())

    def loss() -> Tensor:
        with offload_everything(model):
            return model(x).sum()

    assert all(map(torch.equal, expected, gradients(model, loss)))


def test_entering_again_and_inside_itself() -> None:
    """The same object, in turn and nested."""
    model, x = small_model(), batch()
    expected = gradients(model, lambda: model(x).sum())
    storm = offload_everything(model)
    for _ in range(3):
        with storm:
            assert all(map(torch.equal, expected, gradients(model, lambda: model(x).sum())))

    def nested() -> Tensor:
        with storm:
            first = model[:2](x)
            with storm:
                second = model[2:4](first)
            return model[4](second).sum()

    assert all(map(torch.equal, expected, gradients(model, nested)))
    assert_empty(storm)


def test_one_storm_inside_another() -> None:
    """The inner one has what was saved inside it; both come back to nothing."""
    outer_model, inner_model, x = small_model(), small_model(), batch()
    both = nn.ModuleList([outer_model, inner_model])
    expected = gradients(both, lambda: outer_model(x).sum() + inner_model(x).sum())
    outer, inner = offload_everything(outer_model), keep_everything(inner_model)

    def nested() -> Tensor:
        with outer:
            first = outer_model(x).sum()
            with inner:
                second = inner_model(x).sum()
            return first + second

    assert all(map(torch.equal, expected, gradients(both, nested)))
    assert outer.report()["units"]["offloaded"] > 0
    assert inner.report()["units"]["offloaded"] > 0
    assert_empty(outer)
    assert_empty(inner)


def in_threads(*jobs: Callable[[], None]) -> None:
    """Runs the jobs at once; the first exception of any is raised here."""
    failures: list[Exception] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_threads(shared: bool) -> None:
    """Four threads train four models, each under a Storm of its own, or all under one."""
    models = [small_model() for _ in range(4)]
    one = offload_everything(nn.ModuleList(models))
    storms = [one if shared else offload_everything(model) for model in models]
    expected = [gradients(m, lambda m=m, i=i: m(batch(i)).sum()) for i, m in enumerate(models)]

    def job(i: int) -> None:
        # Hooks are a thread's own: each enters the context for itself.
        with storms[i]:
            for _ in range(25):
                got = gradients(models[i], lambda: models[i](batch(i)).sum())
                assert all(map(torch.equal, expected[i], got))

    in_threads(*(lambda i=i: job(i) for i in range(4)))
    for storm in storms:
        assert_empty(storm)


def test_forward_and_backward_on_different_threads() -> None:
    """As the autograd engine does for CUDA."""
    model, x = small_model(), batch()
    expected = gradients(model, lambda: model(x).sum())
    model.zero_grad()
    with offload_everything(model) as storm:
        loss = model(x).sum()
        in_threads(loss.backward)
        del loss
    assert all(map(torch.equal, expected, [p.grad for p in model.parameters()]))
    assert_empty(storm)


def test_reading_saved_tensors_by_hand() -> None:
    """``grad_fn._saved_result`` unpacks without a backward, any number of times, and stays usable."""
    model, x = small_model(), batch()
    with offload_everything(model) as storm:
        y = model[:2](x)
        for _ in range(3):
            assert torch.equal(y.grad_fn._saved_result, y)
        held = y.grad_fn._saved_result
        copy = held.clone()
        y.sum().backward()
        del y
        model(batch(2)).sum().backward()
        assert torch.equal(held, copy)
        del held
    assert_empty(storm)


def test_an_unpacked_tensor_outlives_its_graph() -> None:
    """What backward handed to the user (a custom Function that keeps it) is the user's."""
    kept: list[Tensor] = []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            kept.extend(ctx.saved_tensors)
            return g * 2

    model, x = small_model(), batch()
    with offload_everything(model) as storm:
        for seed in range(5):
            middle = model[0](batch(seed))
            copy = middle.detach().clone()
            Keeps.apply(middle).sum().backward()
            model(x).sum().backward()
            assert torch.equal(kept[-1], copy)
    assert_empty(storm)


def test_nothing_grows_over_a_thousand_steps() -> None:
    """Pool, disk, units, dedupe table and the number of tensors stand still after the second step."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
    with offload_everything(model) as storm:

        def state() -> tuple[int, ...]:
            storm.close()
            report = storm.report()
            tables = len(storm._by_storage) + len(storm._transfers.leaving) + len(storm._units)
            return (
                report["pool"]["bytes_reserved"],
                report["pool"]["bytes_in_use"],
                report["disk_bytes"],
                tables,
            )

        for step in range(1000):
            if step == 2:
                after_two = state()
                gc.collect()
                objects = len(gc.get_objects())
            abandoned = model(torch.ones(8, 16))
            model(torch.ones(8, 16)).sum().backward()
            del abandoned
        assert state() == after_two
        gc.collect()
        assert len(gc.get_objects()) < objects + 500
    assert_empty(storm)


def test_the_process_ends_with_a_graph_alive() -> None:
    """No hang, no crash and no word when the interpreter goes down with everything still open."""
    script = """
        import torch
        from overspill import Storm
        model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Sigmoid(), torch.nn.Linear(512, 512))
        storm = Storm(model, vram_budget="16MiB", min_bytes=1)
        storm.__enter__()
        alive = model(torch.ones(64, 512))
        alive.sum().backward(retain_graph=True)
    """
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
