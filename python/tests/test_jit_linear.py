"""Layers whose weight exists only around its matmul: the same bits as the layer they were made from."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from overspill import FormatError, JITCompressedLinear, tpde

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def linear(seed: int, device: str, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(192, 160, bias=bias).to(device)


def near(layer: torch.nn.Linear) -> torch.Tensor:
    return layer.weight.detach() + 1e-6 * torch.randn_like(layer.weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("has_base", "bias"), [(True, True), (False, True), (True, False), (False, False)])
def test_outputs_and_gradients_are_the_layers(device: str, has_base: bool, bias: bool) -> None:
    plain = linear(1, device, bias)
    plain.weight.requires_grad_(False)
    packed = JITCompressedLinear.from_linear(plain, near(plain) if has_base else None)
    x = torch.randn(3, 5, 192, device=device)
    grads = []
    for layer in (plain, packed):
        own = x.clone().requires_grad_()
        plain.zero_grad()
        out = layer(own)
        out.square().sum().backward()
        grads.append((out, own.grad, None if plain.bias is None else plain.bias.grad.clone()))
    assert packed.bias is plain.bias
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert theirs is None or torch.equal(ours, theirs)
    assert torch.equal(packed.weight(x.device), plain.weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_base_in_blocks_gives_the_exact_weight(device: str, layout: str, dtype: torch.dtype) -> None:
    plain = linear(5, device).to(dtype)
    base = tpde.quantize(plain.weight, layout)  # type: ignore[arg-type]
    assert base.blocks.nbytes < plain.weight.nbytes * 0.6
    assert not torch.equal(base.dequantize(), plain.weight.cpu())
    packed = JITCompressedLinear.from_linear(plain, base)
    x = torch.randn(3, 192, device=device, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(packed.weight(x.device), plain.weight)
        assert torch.equal(packed(x), plain(x))
        packed.base[3] ^= 1
        with pytest.raises(FormatError, match="wrong base"):
            packed(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32])
def test_bases_of_every_width_give_the_exact_weight(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    old = torch.randn(160, 192)
    new = torch.where(torch.rand(old.shape) < 0.1, old * 1.2, old).to(dtype)
    patch = tpde.open(tpde.pack({"weight": old.to(dtype)}, {"weight": new}).data)
    target = {"weight": old.to(dtype).to(device)}
    patch.apply_(target)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(target["weight"].cpu().view(integer), new.view(integer))


@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_prepares_the_next_layer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [torch.nn.Linear(64, 64).to(device) for _ in range(4)]
    packed = torch.nn.Sequential(
        *[JITCompressedLinear.from_linear(layer, near(layer).contiguous()) for layer in layers]
    )
    chained = JITCompressedLinear.chain(packed)
    assert chained == list(packed)
    prepared = []
    prepare = JITCompressedLinear._prepare

    def counted(layer: JITCompressedLinear, device: torch.device) -> tuple[torch.device, object]:
        prepared.append(chained.index(layer))
        return prepare(layer, device)

    monkeypatch.setattr(JITCompressedLinear, "_prepare", counted)
    x = torch.randn(2, 64, device=device)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(packed(x), torch.nn.Sequential(*layers)(x))
    chained[0]._ahead[0].result()
    assert prepared == [0, 1, 2, 3] * 3 + [0]  # each once a pass, and the first for a pass to come


def test_no_weight_outlives_its_matmul() -> None:
    packed = JITCompressedLinear.from_linear(linear(2, "cpu"))
    made: list[weakref.ref[torch.Tensor]] = []
    weight = packed.weight

    def watched(device: torch.device) -> torch.Tensor:
        tensor = weight(device)
        made.append(weakref.ref(tensor))
        return tensor

    packed.weight = watched  # type: ignore[method-assign]
    out = packed(torch.randn(4, 192, requires_grad=True))
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    out.sum().backward()
    gc.collect()
    assert len(made) == 2 and made[1]() is None


def test_another_base_is_refused_and_state_dicts_carry_the_weight() -> None:
    first, second = linear(3, "cpu"), linear(4, "cpu")
    x = torch.randn(2, 192)
    with torch.no_grad():
        packed = JITCompressedLinear.from_linear(first, near(first))
        other = JITCompressedLinear.from_linear(second, near(second))
        assert torch.equal(packed(x), first(x))
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed(x), second(x))
        assert packed.base is not None
        packed.base[0, 0] += 1
        with pytest.raises(FormatError, match="wrong base"):
            packed(x)
    with pytest.raises(ValueError, match="a base of"):
        JITCompressedLinear.from_linear(first, near(first).half())
