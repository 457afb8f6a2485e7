"""What ``storm_bits.py`` compares, for the processes that it starts: a workload of the test matrix, or Llama blocks."""

from __future__ import annotations

import time
import traceback

import torch
from storm_harness import first_difference, offload_everything, train
from storm_v1 import Blocks
from test_storm_rebuild import REBUILDING, rebuild_everything
from workloads import BUILDERS

from overspill import Storm

# What takes longest; one of these alone at the end would make all others wait.
LONG = ("t5", "moe", "blocks", "compiled", "lora", "gan", "llama", "gpt2", "vit")


def names() -> list[str]:
    """Every case, the longest first. blocks needs a GPU."""
    order = {name: n for n, name in enumerate(LONG)}
    return sorted(["blocks", *BUILDERS], key=lambda name: (order.get(name, len(order)), name))


def workload(name: str, device: str, steps: int) -> str | None:
    """How a workload differs from itself offloaded or rebuilt; None if it does not."""
    base = train(name, device=device, steps=steps)
    if (difference := first_difference(base, train(name, device=device, steps=steps))) is not None:
        return f"its baseline does not repeat itself: {difference}"
    for wrap in (offload_everything, rebuild_everything):
        run = train(name, wrap, device=device, steps=steps)
        if (difference := first_difference(base, run)) is not None:
            return f"{wrap.__name__}: {difference}"
        units = run.context.report()["units"]
        print(f"    {name}, {wrap.__name__}: {units}", flush=True)
        if units["offloaded"] + units["rebuilt"] == 0:
            return f"{wrap.__name__}: nothing was moved"
        if wrap is rebuild_everything and units["rebuilt"] < steps * REBUILDING.get(name, 0):
            return f"only {units['rebuilt']} were rebuilt"
    return None


def blocks(device: str, width: int, steps: int) -> str | None:
    """Llama blocks in bf16 at four budgets."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = Blocks(width, 6).to(device, torch.bfloat16)
    x = torch.randn(2, 2048, width, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        loss = model(x)
        loss.backward()
        return [loss.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]

    want = step()
    if not all(map(torch.equal, want, step())):
        return "the baseline does not repeat itself"
    fixed = torch.cuda.memory_allocated()
    loss = model(x)
    saved = torch.cuda.memory_allocated() - fixed
    del loss
    for divisor in (1.5, 2, 4, 6):
        storm = Storm(model, vram_budget=fixed + int(saved / divisor) + 2**25, host_budget="4GiB")
        with storm:
            for n in range(steps):
                if not all(map(torch.equal, want, step())):
                    return f"budget of saved / {divisor}: step {n}"
        storm.close()
        units = storm.report()["units"]
        print(
            f"    saved / {divisor}: {units} {sorted({s[0] for s in storm._proofs.proved.values()})}",
            flush=True,
        )
    return None


def compare(name: str, device: str, steps: int) -> str | None:
    """How a case differs, in a process of its own; None if it does not."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        return blocks(device, 1024, steps) if name == "blocks" else workload(name, device, steps)
    except Exception as error:
        traceback.print_exc()
        return repr(error)[:200]
    finally:
        print(f"    {name}: {time.perf_counter() - begin:.1f} s", flush=True)
