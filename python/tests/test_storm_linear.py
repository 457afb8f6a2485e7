"""StormLinear against nn.Linear, bit for bit."""

from __future__ import annotations

import pytest
import torch
from storm_harness import devices

from overspill import StormLinear


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(256, 512), (4, 64, 512), (1, 512), (0, 512)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_linear(device: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(512, 128, bias=bias, device=device, dtype=dtype)
    storm = StormLinear(512, 128, bias=bias, device=device, dtype=dtype)
    storm.load_state_dict(plain.state_dict())
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_(True)]
    inputs.append(inputs[0].detach().clone().requires_grad_(True))
    outputs = [layer(x) for layer, x in zip((plain, storm), inputs, strict=True)]
    assert torch.equal(*outputs)
    for out in outputs:
        (out.float() ** 2).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for a, b in zip(plain.parameters(), storm.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_frozen_weight_offloads_nothing_and_still_has_an_input_gradient() -> None:
    layer = StormLinear(64, 64)
    layer.requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
