"""Models whose weights pass through the device: the same bits as when they stay there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from overspill import BudgetError, FormatError, tpde

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
IDS = torch.tensor([[1, 5, 9, 2, 7]])
# Weights of a layer are 0.8 MB, the largest of them 0.18 MB.
SMALL, ROOMY = 1_000_000, 4_000_000


def llama(dtype: torch.dtype = torch.float32, layers: int = 3, **config: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "vocab_size": 200}
    made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes, **config))  # type: ignore[arg-type]
    return made.eval().to(dtype)


def budget(device: str, count: int) -> int:
    """``count`` beyond what the process holds anyway; what the allocator gives out next is full of NaN."""
    if device == "cuda":
        dirt = [torch.full((100 << 10,), 255, dtype=torch.uint8, device=device) for _ in range(64)]
        del dirt
    return count + (torch.cuda.memory_allocated() if device == "cuda" else 0)


def logits(model: LlamaForCausalLM, device: str) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(device)).logits.cpu()


def tokens(model: LlamaForCausalLM, device: str) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(IDS.to(device), **options).cpu()


def near(model: torch.nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """What the model may have been before some training."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in model.state_dict().items():
        share = torch.rand(tensor.shape, generator=generator) < 0.05
        moved[name] = torch.where(share, tensor * 1.01, tensor)
    return moved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [SMALL, ROOMY])
@pytest.mark.parametrize("kind", ["standalone", "raw", "words", "quantized"])
def test_logits_and_tokens_are_the_models(device: str, count: int, kind: str) -> None:
    plain = llama()
    streamed = copy.deepcopy(plain)
    base = None
    if kind == "words":
        base = near(plain)
    elif kind == "quantized":
        base = {name: tpde.quantize(p) for name, p in plain.named_parameters() if p.dim() == 2}
    if base is not None:
        count += 3_000_000  # bases are resident
    options = {"device": device, "base": base, "packed": kind != "raw", "reserve": 60_000}
    handle = tpde.stream(streamed, budget(device, count), **options)
    plain.to(device)
    assert torch.equal(logits(streamed, device), logits(plain, device))
    assert torch.equal(tokens(streamed, device), tokens(plain, device))
    report = handle.report()
    assert report["on_demand"] <= 1  # the very first
    if device == "cpu" and base is None:
        assert (report["resident_bytes"] < report["raw_bytes"]) == (count == SMALL)
    restored = handle.close()
    for (name, ours), theirs in zip(restored.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs.cpu()), name
    assert torch.equal(logits(restored, "cpu"), logits(plain.cpu(), "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_patch_in_a_file_fills_a_model_that_has_no_weights(
    device: str, on_disk: bool, tmp_path: Path
) -> None:
    plain = llama(torch.bfloat16)
    tpde.pack(None, dict(plain.named_parameters()), tmp_path / "model.tpde")
    with torch.device("meta"):
        empty = llama(torch.bfloat16)
    # What no checkpoint holds (the rotary frequencies) comes with the configuration.
    empty.model.rotary_emb = copy.deepcopy(plain.model.rotary_emb)
    tpde.stream(
        empty,
        budget(device, SMALL),
        device=device,
        reserve=60_000,
        on_disk=on_disk,
        patch=tmp_path / "model.tpde",
    )
    assert torch.equal(tokens(empty, device), tokens(plain.to(device), device))
    assert torch.equal(logits(empty, device), logits(plain.to(device), device))


@pytest.mark.parametrize("device", DEVICES)
def test_layers_in_any_order(device: str) -> None:
    plain = torch.nn.ModuleList(torch.nn.Linear(160, 160) for _ in range(7)).requires_grad_(False)
    streamed = copy.deepcopy(plain)
    handle = tpde.stream(streamed, budget(device, 400_000), device=device, reserve=30_000)
    plain.to(device)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 160, generator=generator).to(device)
    for _ in range(60):
        layer = int(torch.randint(7, (), generator=generator))
        with torch.no_grad():
            assert torch.equal(streamed[layer](x), plain[layer](x))
    assert handle.report()["on_demand"] > 10


def test_shared_weights_and_embeddings_stay() -> None:
    plain = llama(tie_word_embeddings=True)
    streamed = copy.deepcopy(plain)
    tpde.stream(streamed, SMALL, device="cpu")
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert streamed.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(streamed, "cpu"), logits(plain, "cpu"))


def test_what_cannot_be_is_refused() -> None:
    plain = llama()
    with pytest.raises(BudgetError, match="the model needs") as refused:
        tpde.stream(copy.deepcopy(plain), 400_000, device="cpu")
    assert refused.value.budget_bytes == 400_000
    patch = tpde.pack(near(plain), dict(plain.state_dict())).data
    assert patch is not None
    with pytest.raises(FormatError, match="wrong base"):
        tpde.stream(copy.deepcopy(plain), ROOMY, device="cpu", patch=patch, base=near(plain, seed=2))
    damaged = patch[:-5000] + bytes([patch[-5000] ^ 1]) + patch[-4999:]
    with pytest.raises(FormatError):
        tpde.stream(copy.deepcopy(plain), ROOMY, device="cpu", patch=damaged, base=near(plain))
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="meta device"):
        tpde.stream(empty, ROOMY, device="cpu")


def test_an_exception_in_a_layer_leaves_no_weight_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(160, 160), torch.nn.Linear(160, 160))
    tpde.stream(model, 600_000, device="cpu")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7))
    assert model[0].weight.device.type == "meta"
    assert model(torch.randn(2, 160)).shape == (2, 160)


class Gate(torch.nn.Module):
    """A module with a large weight of its own that calls another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(160, 160))
        self.inner = torch.nn.Linear(160, 160)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.inner(x) @ self.weight


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_that_calls_another_unit_keeps_its_own_weight(device: str) -> None:
    plain = torch.nn.Sequential(Gate(), Gate()).requires_grad_(False)
    streamed = copy.deepcopy(plain)
    tpde.stream(streamed, budget(device, 1_000_000), device=device, reserve=30_000)
    x = torch.randn(4, 160).to(device)
    assert streamed[0].inner.weight.device.type == "meta"
    assert torch.equal(streamed(x), plain.to(device)(x))
