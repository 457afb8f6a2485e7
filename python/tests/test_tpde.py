"""TPDE through Python: paths and state dicts, torch and numpy, every dtype; errors are typed."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from overspill import FormatError, OverspillError, TransferError, tpde

BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    *(
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.uint16,
        torch.int16,
        torch.uint32,
        torch.int32,
        torch.uint64,
    ),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz),
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor:
    """All patterns: NaN payloads, signed zeros, denormals and infinities among them."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape).astype(bool))
    raw = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    return raw.view(dtype).reshape(shape)


def nudged(tensor: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """Some elements with their lowest bits changed."""
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return tensor.clone()
    words = tensor.contiguous().view(-1)
    words = (
        words.view(torch.int32)
        if tensor.dtype == torch.complex64
        else words.view(BIT_TYPES[tensor.dtype.itemsize])
    )
    moved = words.clone()
    where = torch.from_numpy(rng.random(words.numel()) < share)
    moved[where] ^= 1
    return moved.view(tensor.dtype).reshape(tensor.shape)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = 20260 + len(request.node.name)
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_every_dtype_comes_back(dtype: torch.dtype, share: float, rng: np.random.Generator) -> None:
    base = {
        "w": random_bits((33, 65), dtype, rng),
        "none": random_bits((0, 3), dtype, rng),
        "one": random_bits((), dtype, rng),
    }
    final = {name: nudged(tensor, share, rng) for name, tensor in base.items()}
    ways = ((base, False, "auto"), (base, False, "gpu"), (base, True, "auto"), (None, False, "auto"))
    for old, absolute, codec in ways:
        packed = tpde.pack(old, final, absolute=absolute, codec=codec)
        assert packed.data is not None and packed.packed_bytes == len(packed.data)
        assert_same(tpde.apply(packed.data, old, framework="torch"), final)
    again = tpde.apply(tpde.pack(base, final, absolute=True).data, final)
    assert_same(again, final)


def test_numpy_comes_back(rng: np.random.Generator) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    base = {
        "a": rng.standard_normal((64, 64)).astype(np.float32),
        "b": rng.standard_normal(100).astype(ml_dtypes.bfloat16),
    }
    final = {name: (value * value.dtype.type(1.001)).astype(value.dtype) for name, value in base.items()}
    found = tpde.apply(tpde.pack(base, final).data, base)
    for name, value in final.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes()


def test_not_contiguous_and_tied(rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((40, 30)).astype(np.float32))
    base = {"t": weight.T, "sliced": weight[::2, 1:], "tied": weight, "tied2": weight}
    final = {name: tensor + 1e-3 for name, tensor in base.items()}
    assert_same(tpde.apply(tpde.pack(base, final).data, base), final)


def test_files_added_removed_reshaped_retyped(tmp_path, rng: np.random.Generator) -> None:
    base = {
        "kept": torch.randn(64, 64),
        "gone": torch.randn(8),
        "flat": torch.arange(12.0),
        "typed": torch.randn(16),
    }
    final = {
        "kept": base["kept"] + 1e-4,
        "new": torch.randn(5),
        "flat": base["flat"].view(3, 4),
        "typed": base["typed"].bfloat16(),
    }
    a, b, p, out = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "p.tpde", "out.safetensors")
    )
    save_file(base, a)
    save_file(final, b, metadata={"format": "pt", "step": "7"})
    packed = tpde.pack(a, b, p)
    assert packed.data is None and packed.packed_bytes == p.stat().st_size
    tpde.apply(p, a, out)
    assert out.read_bytes() == b.read_bytes()
    assert_same(tpde.apply(p, base), load_file(b))
    report = tpde.inspect(p)
    assert report["raw_bytes"] == packed.raw_bytes and len(report["tensors"]) == 4
    assert {t["name"]: t["base"] for t in report["tensors"]} == {
        "kept": "words",
        "new": "none",
        "flat": "words",
        "typed": "none",
    }
    assert tpde.open(p).verify(a) and not tpde.open(p).verify()
    assert load_file(p)["blob"].dtype == torch.uint8, "a patch is a safetensors file"


def test_wrong_base_is_refused_with_both_ids(tmp_path) -> None:
    base, final = {"w": torch.randn(64)}, {"w": torch.randn(64)}
    packed = tpde.pack(base, final)
    with pytest.raises(FormatError, match="wrong base") as caught:
        tpde.apply(packed.data, final)
    assert caught.value.expected_state == packed.base_id and caught.value.found_state == packed.final_id
    out = tmp_path / "out.safetensors"
    with pytest.raises(FormatError, match="wrong base"):
        tpde.apply(packed.data, {"w": torch.randn(65)}, out)
    assert list(tmp_path.iterdir()) == []
    assert_same(tpde.apply(packed.data, base, base_id=packed.base_id), final)
    with pytest.raises(FormatError):
        tpde.apply(packed.data, base, base_id=packed.final_id)


def test_into_tensors_that_the_caller_holds(rng: np.random.Generator) -> None:
    base = {name: random_bits((600, 5), torch.bfloat16, rng) for name in ("a", "b")}
    final = {name: nudged(tensor, 0.05, rng) for name, tensor in base.items()}
    patch = tpde.open(tpde.pack(base, final).data)
    into = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    version = into["a"]._version
    made = patch.apply(base, into=into)
    assert_same(into, final)
    assert made["a"].data_ptr() == into["a"].data_ptr() and into["a"]._version > version
    untouched = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    with pytest.raises(FormatError, match="wrong base"):
        patch.apply(final, into=untouched)
    assert not any(bits(tensor).any() for tensor in untouched.values())
    whole = torch.zeros(1200, 5, dtype=torch.bfloat16)
    for shared in (
        base,
        {"a": into["a"], "b": base["a"]},
        {"a": into["a"], "b": into["a"]},
        {"a": whole[:600], "b": whole[599:1199]},
    ):
        with pytest.raises(ValueError, match="share memory"):
            patch.apply(base, into=shared)
    assert_same(tpde.apply(patch, base), final)


def test_into_a_module_that_then_knows_its_state() -> None:
    old, new, target = (torch.nn.Linear(8, 8) for _ in range(3))
    patch = tpde.open(tpde.pack(old.state_dict(), new.state_dict()).data)
    patch.apply(old.state_dict(), into=target)
    assert_same(target.state_dict(), new.state_dict())
    assert tpde.resident_id(target) == patch.final_id


def test_errors_are_typed(tmp_path) -> None:
    with pytest.raises(TransferError) as missing:
        tpde.open(tmp_path / "none.tpde")
    assert missing.value.path == str(tmp_path / "none.tpde")
    data = bytearray(tpde.pack(None, {"w": torch.randn(64)}).data)
    data[-1] ^= 1
    with pytest.raises(OverspillError):
        tpde.apply(bytes(data))
    with pytest.raises(ValueError, match="give its base"):
        tpde.apply(tpde.pack({"w": torch.zeros(4)}, {"w": torch.ones(4)}).data)
    with pytest.raises(TypeError, match="no safetensors dtype"):
        tpde.pack(None, {"w": np.zeros(3, dtype=np.complex128)})


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def stepped(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """What a small step in a random direction makes of a model."""
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        made[name] = (tensor.cpu().float() + 1e-4 * noise).to(tensor.dtype)
    return made


def small_model() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [torch.nn.Embedding(500, 96), torch.nn.Linear(96, 700), torch.nn.LayerNorm(700)]
    model = torch.nn.Sequential(*layers).to(torch.bfloat16)
    model.register_buffer("wide", torch.randn(333, dtype=torch.float64))
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_resident_model_is_patched_step_after_step(device, absolute, tmp_path) -> None:
    model = small_model()
    pointers = [parameter.data_ptr() for parameter in model.to(device).parameters()]
    for seed in range(3):
        final = stepped(model, seed)
        codec = "gpu" if seed == 1 else "auto"
        tpde.pack(model.state_dict(), final, tmp_path / "p.tpde", absolute=absolute, codec=codec)
        versions = [parameter._version for parameter in model.parameters()]
        made = tpde.open(tmp_path / "p.tpde").apply_(model)
        assert made == tpde.state_id(final)
        assert all(torch.equal(bits(t.cpu()), bits(final[n])) for n, t in model.state_dict().items())
        assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    if not absolute:
        with pytest.raises(FormatError, match="wrong base"):
            tpde.open(tmp_path / "p.tpde").apply_(model)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_nothing_is_written_before_the_patch_is_authenticated(device) -> None:
    model = small_model().to(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = tpde.pack(model.state_dict(), stepped(model, 7))
    assert packed.data is not None
    middle = packed.data.index(b"manifest") + 600
    damaged = packed.data[:middle] + bytes([packed.data[middle] ^ 1]) + packed.data[middle + 1 :]
    with pytest.raises(FormatError):
        tpde.open(damaged).apply_(model)
    assert all(torch.equal(bits(t), bits(before[n])) for n, t in model.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_tied_weights_are_patched_once(device) -> None:
    base = {"a": torch.randn(3000).to(device)}
    base["b"] = base["a"]
    final = {name: tensor + 1e-3 for name, tensor in base.items()}
    packed = tpde.pack(base, final)
    tpde.open(packed.data).apply_(base, base_id=packed.base_id)
    assert torch.equal(base["a"], final["a"])


def test_in_place_refuses_what_does_not_fit() -> None:
    base = {"w": torch.randn(64, 64)}
    patch = tpde.open(tpde.pack(base, {"w": base["w"] + 1}).data)
    with pytest.raises(ValueError, match="no tensor 'w'"):
        patch.apply_({})
    with pytest.raises(ValueError, match="'w' is"):
        patch.apply_({"w": base["w"].half()})
    with pytest.raises(ValueError, match="not contiguous"):
        patch.apply_({"w": base["w"].t()})
    with pytest.raises(ValueError, match="not a CUDA device"):
        patch.to("cpu")


def test_progress_ends_at_the_total_and_other_threads_run() -> None:
    base = {f"w{i}": torch.randn(256, 1024) for i in range(8)}
    final = {name: tensor + 1e-5 for name, tensor in base.items()}
    calls: list[tuple[int, int]] = []
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = ticks
    packed = tpde.pack(base, final, progress=lambda now, total: calls.append((now, total)))
    during = ticks - before
    done.set()
    thread.join()
    assert during > 0, "the GIL was held"
    assert max(now for now, _ in calls) == calls[0][1] == packed.raw_bytes


def test_command_line_of_the_wheel(tmp_path) -> None:
    save_file({"w": torch.randn(64)}, tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "overspill", "tpde"]
    run = subprocess.run(
        [*command, "pack", "--final", "a.safetensors", "-o", "p.tpde", "-q"], cwd=tmp_path, check=False
    )
    assert run.returncode == 0 and (tmp_path / "p.tpde").exists()
    run = subprocess.run(
        [*command, "apply", "--patch", "a.safetensors", "-o", "x"], cwd=tmp_path, check=False
    )
    assert run.returncode == 1 and not (tmp_path / "x").exists()


def test_the_command_line_and_paths_need_no_torch() -> None:
    code = "import sys, overspill.__main__, overspill.tpde; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rebuilt_tensors_share_pages_but_no_storage(tmp_path, rng) -> None:
    state = {f"t{i}": random_bits((33, i), torch.bfloat16, rng) for i in range(6)}
    found = tpde.apply(tpde.pack(None, state).data)
    for name, tensor in found.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes == state[name].nbytes
    save_file(found, tmp_path / "again.safetensors")
    found["t1"].zero_()
    assert_same(
        {name: t for name, t in found.items() if name != "t1"}, {n: t for n, t in state.items() if n != "t1"}
    )
    arrays = tpde.apply(
        tpde.pack(None, {n: t.view(torch.int16).numpy() for n, t in state.items()}).data, framework="numpy"
    )
    arrays["t2"][:] = 0
    assert np.array_equal(arrays["t3"], state["t3"].view(torch.int16).numpy())
