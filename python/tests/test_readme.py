"""What the README and the documents show works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from overspill._edge import CpuEdge
from overspill._native import run_cli

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The `overspill` commands of a document, in order, but `doctor`, which measures the machine, and `serve`, which stays."""
    whole = [block.replace("\\\n", " ") for block in blocks("sh", text)]
    split = [shlex.split(line, comments=True) for block in whole for line in block.splitlines()]
    return [
        command for command in split if command[:1] == ["overspill"] and command[1] not in ("doctor", "serve")
    ]


class Lines(nn.Module):
    """A model whose output has a loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor) -> Any:
        class Output:
            loss = self.body(x).square().mean()

        return Output


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two checkpoints that the README names, in the current folder."""
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    save_file({"w": base}, tmp_path / "step-100.safetensors")
    save_file({"w": base + (torch.rand(64, 64) < 0.1) * 0.01}, tmp_path / "step-101.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("checkpoints")
def test_python_blocks_run() -> None:
    sources = [source for source in blocks("python") if "SessionPool" not in source]
    assert len(sources) >= 2
    model = Lines()
    for source in sources:
        exec(compile(source, "README.md", "exec"), {"model": model, "batch": {"x": torch.randn(8, 64)}})
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert Path("step-101.tpde").exists()


def test_sessions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuEdge, "allocated_bytes", lambda edge: 2**30)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, max_position_embeddings=64, **sizes)).eval()
    (source,) = [source for source in blocks("python") if "SessionPool" in source]
    scope: dict[str, Any] = {"model": model, "ids": [1, 2, 3]}
    exec(compile(source, "README.md", "exec"), scope)
    assert len(scope["answer"].tokens) == 8


@pytest.mark.usefixtures("checkpoints")
def test_commands_do_what_they_say() -> None:
    shown = commands(README)
    assert len(shown) >= 3
    assert [run_cli(command) for command in shown] == [0] * len(shown)
    expected = load_file("step-101.safetensors")["w"]
    assert torch.equal(load_file("restored.safetensors")["w"], expected)
    assert torch.equal(load_file("again.safetensors")["w"], expected)


@pytest.mark.usefixtures("checkpoints")
def test_commands_of_the_chains_document() -> None:
    shown = commands((Path(__file__).parents[2] / "docs" / "chains.md").read_text(encoding="utf-8"))
    assert len(shown) >= 6
    assert [run_cli(command) for command in shown] == [0] * len(shown)
    assert torch.equal(load_file("again.safetensors")["w"], load_file("step-100.safetensors")["w"])


def test_blocks_of_the_weights_document() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    sources = blocks(
        "python", (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    )
    assert len(sources) >= 5
    for source in sources:
        exec(compile(source, "weights.md", "exec"), scope)


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([a-z][a-z-]*)", README))
    assert {"demo", "test"} <= named
    assert not {name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)}
