"""``overspill serve``: the model's side of the server. Sockets, sessions' names and queues are Rust's."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from .._native import serve
from ..djinn import SessionPool
from ..errors import ServerError
from .executor import SessionExecutor
from .model import load_model, load_tokenizer, smollm2

# Without a GPU the device is RAM, and nobody says how much of it is ours.
CPU_ARENA = "2GiB"


def main(options_json: str) -> None:
    """Serves as the options of the command line say, until it is told to end."""
    options: dict[str, Any] = json.loads(options_json)
    folder = Path(options["model"]) if options["model"] else smollm2()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, device, options["dtype"])
    arena = options["arena_budget"]
    if arena is None and options["vram_budget"] is None and device.type == "cpu":
        arena = CPU_ARENA
    pool = SessionPool(
        model, options["vram_budget"], options["host_budget"], options["spill_dir"],
        session_tokens=options["session_tokens"], arena_budget=arena, spill_limit=options["spill_limit"],
    )  # fmt: skip
    name = options["name"] or folder.resolve().name
    config = {
        "bind": options["bind"],
        "keys": api_keys(options["api_keys"]),
        "state_dir": options["state_dir"],
        "limits": options["limits"],
    }
    run(SessionExecutor(pool, load_tokenizer(folder)), name, config)


def run(executor: SessionExecutor, name: str, config: dict[str, Any]) -> None:
    """Serves ``executor``'s model under ``name``; ``config`` is that of the Rust side, with ``bind``, ``keys``,
    ``state_dir`` and ``limits``.
    """
    slabs = executor.pool.report()["slabs"]

    def ready(address: str) -> None:
        print(f"{name}: http://{address}, room on the device for {slabs} sessions", flush=True)

    shape = executor.pool.shape
    info = {
        "id": name,
        "layers": len(shape.layers),
        "hidden_size": executor.pool.model.config.get_text_config(decoder=True).hidden_size,
        "session_tokens": executor.pool.session_tokens,
        "slabs": slabs,
        "device": str(shape.device),
    }
    # A full collection would look at all that the imports made, a third of a second between two tokens.
    gc.collect()
    gc.freeze()
    serve(json.dumps(config), json.dumps(info), executor, ready)


def api_keys(path: str | None) -> list[str]:
    """The keys in a file, one a line, or in ``OVERSPILL_API_KEYS``, with commas between.

    Raises:
        ServerError: there is a file, and no key in it.
    """
    if path is None:
        return [key.strip() for key in os.environ.get("OVERSPILL_API_KEYS", "").split(",") if key.strip()]
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ServerError(f"{path} has no keys", path=path)
    return keys
