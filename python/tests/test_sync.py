"""Weight sync into workers that hold a checkpoint's tensors fused, padded and in parts: the loader's bits exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fused_worker import Cluster, FusedWorker, Worker
from transformers import LlamaConfig, LlamaForCausalLM

from overspill import FormatError, sync, tpde

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


class Trainer:
    """fp32 masters, steps of AdamW, and their cast to bf16."""

    def __init__(self, lr: float = 1e-5, device: str = "cpu") -> None:
        torch.manual_seed(7)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 150}
        config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **sizes)
        self.model = LlamaForCausalLM(config).to(device)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().to(torch.bfloat16) for name, p in self.model.named_parameters()}

    def step(self) -> None:
        ids = torch.randint(150, (2, 12), device=self.device)
        self.model(ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def cluster(state: dict[str, torch.Tensor], ranks: int, device: str) -> Cluster:
    workers = []
    for rank in range(ranks):
        model = FusedWorker(state, rank, ranks, device)
        model.load_weights(state.items())
        engine = sync.PatchWeightTransferEngine(None, None, torch.device(device), model)
        workers.append(Worker(model, engine))
    return Cluster(workers)


def assert_holds(cluster: Cluster, state: dict[str, torch.Tensor], device: str) -> None:
    for worker in cluster.workers:
        expected = FusedWorker(state, worker.model.rank, worker.model.ranks, device)
        expected.load_weights(state.items())
        for (name, ours), theirs in zip(worker.model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ranks", "absolute"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("has_folder", [False, True])
def test_every_step_reaches_every_rank(
    device: str, ranks: int, absolute: bool, has_folder: bool, tmp_path: Path
) -> None:
    trainer = Trainer(device=device)
    workers = cluster(trainer.state(), ranks, device)
    options = {"absolute": absolute, "folder": tmp_path if has_folder else None}
    engine = sync.PatchTrainerEngine.trainer_init(options, client=workers, source=trainer.state)
    for _ in range(3):
        trainer.step()
        packed = engine.send_weights()
        assert_holds(workers, trainer.state(), device)
        assert workers.versions[-1] == packed.final_id
    raw = 3 * packed.raw_bytes
    assert has_folder or workers.received_bytes < raw / 2


def test_what_no_rank_may_take_is_refused_before_it_is_written() -> None:
    trainer = Trainer()
    before = trainer.state()
    workers = cluster(before, 2, "cpu")
    engine = sync.PatchTrainerEngine(workers, trainer.state)
    trainer.step()
    after = trainer.state()
    relative = tpde.pack(before, after).data
    with pytest.raises(FormatError, match="absolute patches only"):
        workers.update_weights({"data": relative})
    absolute = tpde.pack(before, after, absolute=True).data
    assert absolute is not None
    damaged = bytearray(absolute)
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(FormatError):
        tpde.Patch(bytes(damaged)).authenticate()
    assert_holds(workers, before, "cpu")
    engine.send_weights()
    workers.update_weights({"data": absolute})  # an absolute patch may be applied twice
    assert_holds(workers, after, "cpu")
    trainer.step()
    later = tpde.pack(trainer.state(), before, absolute=True).data
    with pytest.raises(FormatError, match="the patch starts from") as refused:
        workers.update_weights({"data": later})
    assert refused.value.found_state == tpde.state_id(after)
    assert_holds(workers, after, "cpu")
    with pytest.raises(ValueError, match="not UpdateInfo"):
        workers.update_weights({"data": absolute, "words": 1})


def test_a_failure_half_way_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    workers = cluster(trainer.state(), 2, "cpu")
    engine = sync.PatchTrainerEngine(workers, trainer.state)
    trainer.step()

    def broken(*_: object) -> None:
        raise RuntimeError("power")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power"):
        patched.setattr(sync.Receiver, "_scatter", broken)
        engine.send_weights()
    with pytest.raises(FormatError, match="half way"):
        engine.send_weights()


def test_layouts_are_learnt_and_weights_left_alone() -> None:
    state = Trainer().state()
    model = FusedWorker(state, 1, 2, "cpu")
    model.load_weights(state.items())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layout = sync.learn_layout(model, model.load_weights, {n: t.shape for n, t in state.items()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    key = layout["model.layers.0.self_attn.k_proj.weight"][0]
    assert key.of == ((16, 32), (0, 64)) and key.held == ((32, 48), (0, 64))
    down = layout["model.layers.1.mlp.down_proj.weight"][0]
    assert down.of == ((0, 64), (48, 96)) and down.held == ((0, 64), (0, 48))

    def transposed(weights: object) -> None:
        for name, tensor in weights:  # type: ignore[attr-defined]
            model.load_weights(
                [(name, tensor.t().contiguous().view(tensor.shape) if tensor.dim() == 2 else tensor)]
            )

    with pytest.raises(ValueError, match="in another order"):
        sync.learn_layout(model, transposed, {n: t.shape for n, t in state.items()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_changes_are_positions_and_words(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    for share in (0.0, 0.002, 0.3, 1.0):
        old = torch.randn(70, 64, generator=generator).to(dtype)
        moved = torch.rand(old.shape, generator=generator) < share
        new = torch.where(moved, (old.float() * 1.5 + 1).to(dtype).view(old.shape).float(), old.float()).to(
            dtype
        )
        patch = tpde.open(tpde.pack({"w": old}, {"w": new}, absolute=True).data)
        ((_, positions, words),) = patch.changes(device)
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        made = old.view(integer).flatten().clone()
        made[positions.cpu()] = words.cpu()
        assert torch.equal(made.view(old.shape), new.view(integer))
        if share == 0.002:
            assert positions.numel() < 200
