"""Many fine-tunes over one resident base: every switch gives a variant's weights bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

from overspill import FormatError, _variants, tpde

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def small_model() -> torch.nn.Module:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(400, 64), torch.nn.Linear(64, 400, bias=False))
    model[1].weight = model[0].weight  # tied
    model.append(torch.nn.LayerNorm(400))
    return model.to(torch.bfloat16)


def tuned(model: torch.nn.Module, seed: int, size: float) -> dict[str, torch.Tensor]:
    """What training might make of the weights: many small changes and some whole rows."""
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    final = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in made:
            noise = size * torch.randn(tensor.shape, generator=generator)
            new = (tensor.cpu().float() + noise).to(tensor.dtype)
            new.flatten()[seed] = float("nan")
            new.flatten()[seed + 1] = -0.0
            made[tensor.data_ptr()] = new
        final[name] = made[tensor.data_ptr()]
    return final


def bits(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().view(torch.int16).clone() for name, tensor in state.items()}


def assert_holds(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = bits(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(params=[True, False], ids=["room for a second set", "no room"])
def has_room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way back is packed where the weights lie, or on the host."""

    def copied(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return {name: tensor.detach().clone() for name, tensor in held.items()} if request.param else None

    monkeypatch.setattr(_variants, "_copied", copied)


@pytest.fixture(params=DEVICES)
def rig(request: pytest.FixtureRequest, has_room: None) -> tuple[torch.nn.Module, dict, dict]:
    """A model, the patches of its variants, and the bits of every state (the base's under None)."""
    model = small_model().to(request.param)
    base = model.state_dict()
    finals = {name: tuned(model, seed, size) for name, seed, size in [("a", 1, 1e-4), ("b", 2, 1e-2)]}
    finals["same"] = {name: tensor.cpu().clone() for name, tensor in base.items()}
    patches = {name: tpde.pack(base, final).data for name, final in finals.items()}
    return model, patches, {None: bits(base)} | {name: bits(final) for name, final in finals.items()}


def test_every_switch_gives_the_variants_bits(rig) -> None:
    model, patches, expected = rig
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    tunes = tpde.variants(model, patches)
    assert (tunes.names, tunes.current) == (["a", "b", "same"], None)
    ids = {}
    chosen = random.Random(3)
    for step in range(20):
        name = chosen.choice([None, *tunes.names])
        made = tunes.switch(name)
        assert ids.setdefault(name, made) == made, step
        assert tunes.current == name
        assert_holds(model, expected[name])
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert ids[None] == tunes.base_id


def test_variants_come_and_go(rig) -> None:
    model, patches, expected = rig
    tunes = tpde.variants(model, {"a": patches["a"]})
    tunes.switch("a")
    tunes.add("b", patches["b"])  # of the base, to which the weights go back
    assert tunes.current is None
    assert_holds(model, expected[None])
    tunes.switch("b")
    assert_holds(model, expected["b"])
    tunes.remove("b")
    assert_holds(model, expected[None])
    assert tunes.names == ["a"]
    with pytest.raises(KeyError):
        tunes.switch("b")
    with pytest.raises(ValueError, match="already"):
        tunes.add("a", patches["a"])
    with pytest.raises(ValueError, match="stands alone"):
        tunes.add("whole", tpde.pack(None, model.state_dict()).data)


def test_a_patch_of_another_base_is_refused(rig) -> None:
    model, patches, expected = rig
    tunes = tpde.variants(model, {"a": patches["a"]})
    tunes.switch("a")
    other = tpde.pack(model.state_dict(), tuned(model, 5, 1e-3)).data  # of variant a, not of the base
    with pytest.raises(FormatError, match="wrong base"):
        tunes.add("c", other)
    assert_holds(model, expected[None])
    tunes.switch("a")
    assert_holds(model, expected["a"])


def test_a_switch_that_fails_half_way_is_remembered(rig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, patches, _ = rig
    tunes = tpde.variants(model, {"a": patches["a"], "b": patches["b"]})
    tunes.switch("a")
    apply = tpde.Patch.apply_

    def fails(patch: tpde.Patch, *args: object, **options: object) -> str:
        if patch.final_id == tpde.Patch(patches["b"]).final_id:
            raise FormatError("as if the base did not fit")
        return apply(patch, *args, **options)

    monkeypatch.setattr(tpde.Patch, "apply_", fails)
    with pytest.raises(FormatError, match="as if"):
        tunes.switch("b")
    with pytest.raises(FormatError, match="load the model anew"):
        tunes.switch(None)
