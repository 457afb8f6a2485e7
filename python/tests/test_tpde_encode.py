"""Steps encoded where the states lie: the same states and ids as packing on the CPU, and a base that is wrong refused."""

from __future__ import annotations

import pytest
import torch

from overspill import FormatError, tpde

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def states(device: str, share: float = 0.02) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state and the next one: several types, a scalar, a row of unchanged words, one new tensor, one of 64 bits."""
    torch.manual_seed(3)
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16, "d": torch.float64}
    base = {name: torch.randn(300, 70).to(dtype) for name, dtype in dtypes.items()}
    base["few"] = torch.tensor(1.5)
    base["e"] = torch.randint(0, 255, (5000,), dtype=torch.uint8)
    final = {}
    for name, tensor in base.items():
        moved = torch.rand(tensor.shape) < share
        final[name] = torch.where(moved, tensor + tensor.new_ones(()), tensor)
    final["same"] = base["same"] = torch.randn(64, 64).bfloat16()
    final["new"] = torch.randn(10, 33).bfloat16()
    return ({n: t.to(device) for n, t in base.items()}, {n: t.to(device) for n, t in final.items()})


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.cpu(), theirs[name].cpu()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.7])
def test_a_step_makes_the_final_state(device: str, share: float) -> None:
    base, final = states(device, share)
    packed = tpde.encode(base, final)
    assert packed.kind == "relative" and packed.data is not None
    assert packed.base_id == tpde.state_id({n: t.cpu() for n, t in base.items()})
    assert packed.final_id == tpde.state_id({n: t.cpu() for n, t in final.items()})
    assert packed.packed_bytes == len(packed.data)
    host = {name: tensor.cpu() for name, tensor in base.items()}
    assert_same(tpde.apply(bytes(packed.data), host), final)
    live = {name: base.get(name, torch.zeros_like(t)).clone() for name, t in final.items()}
    made = tpde.open(packed.data).apply_(live, base_id=packed.base_id)
    assert made == packed.final_id == tpde.state_id(live)
    assert_same(live, final)


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_alone(device: str) -> None:
    _, final = states(device)
    packed = tpde.encode(None, final)
    assert packed.kind == "standalone" and packed.data is not None
    assert_same(tpde.apply(bytes(packed.data)), final)


@pytest.mark.parametrize("device", DEVICES)
def test_a_worker_in_another_state_is_refused_and_left_alone(device: str) -> None:
    base, final = states(device)
    del final["new"]
    data = tpde.encode(base, final).data
    assert data is not None
    live = {name: tensor.clone() for name, tensor in base.items()}
    live["a"][7, 7] += 1
    kept = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(FormatError):
        tpde.open(data).apply_(live)
    assert_same(live, kept)
    live["a"].copy_(base["a"])
    tpde.open(data).apply_(live)
    assert_same(live, final)


@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_of_steps_names_each_state_once(device: str) -> None:
    base, final = states(device)
    del final["new"]
    live = {name: tensor.clone() for name, tensor in base.items()}
    state = tpde.state_id(base)
    for _ in range(3):
        packed = tpde.encode(base, final, base_id=state)
        assert packed.data is not None
        received = tpde.host_buffer(len(packed.data), device)
        received[:] = packed.data
        state = tpde.open(received).apply_(live, base_id=state)
        assert state == packed.final_id
        base = {name: tensor.clone() for name, tensor in final.items()}
        final["a"][:, :9] += 1
    assert_same(live, base)


@pytest.mark.parametrize("device", DEVICES)
def test_damage_is_found_before_the_first_write(device: str) -> None:
    base, final = states(device)
    del final["new"]
    packed = tpde.encode(base, final)
    assert packed.data is not None
    for at in range(50, len(packed.data), len(packed.data) // 7):
        damaged = bytearray(packed.data)
        damaged[at] ^= 16
        live = {name: tensor.clone() for name, tensor in base.items()}
        with pytest.raises(FormatError):
            tpde.open(damaged).apply_(live, base_id=packed.base_id)
        assert_same(live, base)


def test_memory_that_is_not_copied_is_kept() -> None:
    base, final = states("cpu")
    data = bytearray(tpde.encode(base, final).data or b"")
    patch = tpde.open(data)
    with pytest.raises(BufferError):
        data.clear()
    assert_same(patch.apply(base), final)
    assert tpde.open(memoryview(bytes(data))).final_id == patch.final_id


@needs_gpu
def test_ids_are_the_same_wherever_the_words_lie() -> None:
    generator = torch.Generator().manual_seed(5)
    whole = torch.randint(0, 256, (70_000_000,), dtype=torch.uint8, generator=generator)
    on_device = whole.cuda()
    for start, length in [
        (0, 240),
        (0, 241),
        (1, 1 << 24),
        (3, (1 << 25) + 17),
        (16, 70_000_000 - 16),
        (8, 123_456),
    ]:
        there = {"x": on_device[start : start + length]}
        assert tpde.state_id(there) == tpde.state_id({"x": whole[start : start + length]}), (start, length)


@needs_gpu
def test_a_patch_that_nobody_holds_gives_its_memory_back() -> None:
    base, final = states("cuda")
    first = tpde.encode(base, final).data
    assert first is not None
    held, kept = torch.frombuffer(first, dtype=torch.uint8).data_ptr(), bytes(first)
    second = tpde.encode(base, final).data
    assert second is not None and torch.frombuffer(second, dtype=torch.uint8).data_ptr() != held
    assert bytes(first) == kept == bytes(second)
    del first, second
    third = tpde.encode(base, final).data
    assert third is not None and bytes(third) == kept


@needs_gpu
def test_a_step_is_read_behind_what_the_current_stream_was_given() -> None:
    base, final = states("cuda")
    expected = tpde.encode(base, final)
    late = {name: torch.zeros_like(tensor) for name, tensor in final.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(400_000_000)  # some tenths of a second
        for name, tensor in late.items():
            tensor.copy_(final[name])
        packed = tpde.encode(base, late)
    assert packed.final_id == expected.final_id
    assert packed.data is not None and packed.data == expected.data


@needs_gpu
def test_a_longer_step_than_the_last_one_moves_to_more_memory() -> None:
    torch.manual_seed(9)
    base = {"w": torch.randn(5000, 4096, device="cuda").bfloat16()}
    for share in (0.0, 0.001, 0.9, 0.2):
        final = {"w": torch.where(torch.rand(5000, 4096, device="cuda") < share, -base["w"], base["w"])}
        packed = tpde.encode(base, final)
        assert packed.data is not None
        live = {"w": base["w"].clone()}
        tpde.open(packed.data).apply_(live, base_id=packed.base_id)
        assert torch.equal(live["w"], final["w"]) and tpde.state_id(live) == packed.final_id
