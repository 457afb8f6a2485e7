"""One training run of the demo, in a process of its own: ``python -m overspill.demo.train SPEC``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from overspill import Storm
from overspill._edge import edge_for

from .data import load, warm_up
from .memory import PeakMeter

LEARNING_RATE = 1e-3


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains as ``spec`` says; losses, gradient digests, times and peaks.

    ``budget_bytes`` counts from what the process held before the model was loaded; None keeps all.
    """
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    device = torch.device(spec["device"])
    warm_up(device)
    edge = edge_for(device)
    meter = PeakMeter(device)
    held_before = edge.allocated_bytes()
    source = (Path(spec["model_dir"]), spec["steps"] * spec["batch"] * spec["sequence"], device)
    model, tokens = load(*source)
    batches = tokens.view(spec["steps"], spec["batch"], spec["sequence"])
    context: Any = contextlib.nullcontext()
    if spec["budget_bytes"] is not None:
        context = Storm(model, vram_budget=held_before + spec["budget_bytes"], spill_dir=spec["spill_dir"])
    steps = []
    _save(model, spec, 0)
    with context as storm:
        for number, batch in enumerate(batches):
            steps.append(_step(model, batch, device))
            _progress(spec["name"], number + 1, spec["steps"], steps[-1])
            _save(model, spec, number + 1)
    result = {
        "steps": steps,
        "os_peak_bytes": meter.peak_bytes(),
        "os_start_bytes": meter.start_bytes,
        "held_before_bytes": held_before,
        "storm": storm.report() if storm is not None else None,
    }
    if spec["repeat_first"]:
        del model
        result["repeated"] = _step(load(*source)[0], batches[0], device)
    return result


def _step(model: torch.nn.Module, batch: torch.Tensor, device: torch.device) -> dict[str, Any]:
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    value = loss.item()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    digest = _digest(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-LEARNING_RATE)
    return {"loss": value, "loss_hex": value.hex(), "gradients": digest, "ms": elapsed_ms}


def _save(model: torch.nn.Module, spec: dict[str, Any], step: int) -> None:
    """Writes the weights after ``step`` where the run is to keep them, between steps, when little else is held."""
    if spec["save_to"] is not None:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        save_file(weights, Path(spec["save_to"]) / f"step-{step}.safetensors")


def _digest(model: torch.nn.Module) -> str:
    """A hash of every bit of every gradient."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if parameter.grad is not None:
            digest.update(parameter.grad.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _progress(name: str, done: int, total: int, step: dict[str, Any]) -> None:
    bar = "#" * done + "." * (total - done)
    print(
        f"  {name:<9} [{bar}] step {done}/{total}  loss {step['loss']:.4f}  {step['ms'] / 1e3:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    specification = json.loads(path.read_text())
    path.with_suffix(".result.json").write_text(json.dumps(train(specification)))
