"""Chains from Python: states, snapshots, errors, and a Trainer run that is taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from overspill import tpde
from overspill.errors import FormatError, TransferError


def drift(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(t.shape, generator=generator) < 0.03, t * 1.01, t).to(t.dtype)
        for name, t in state.items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def states() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    print("seed 0")
    found = [{"w": torch.randn(64, 33).bfloat16(), "b": torch.randn(33), "n": torch.tensor(7)}]
    for seed in range(11):
        found.append({**drift(found[-1], seed), "n": torch.tensor(seed)})
    return found


def test_every_step_comes_back(tmp_path: Path, states: list[dict[str, torch.Tensor]]) -> None:
    chain = tpde.Chain(tmp_path / "run.chain")
    for step, state in enumerate(states):
        moments = {"m": torch.full((100,), float(step))}
        committed = chain.commit(step, state, moments if step % 2 else None)
        assert committed.parts["params"].raw_bytes == sum(t.nbytes for t in state.values())
    again = tpde.Chain(tmp_path / "run.chain", create=False)
    assert [step.step for step in again.log()] == list(range(12))
    assert again.log()[0].parts["params"].role == "keyframe"
    assert all(same(again.restore(step), state) for step, state in enumerate(states))
    assert same(again.restore(), states[-1])
    assert torch.equal(again.restore(5, part="moments")["m"], torch.full((100,), 5.0))
    again.restore(3, tmp_path / "three.safetensors")
    assert tpde.state_id(tmp_path / "three.safetensors") == tpde.state_id(states[3])
    assert again.verify(decode=True) == 12
    steps, freed = again.gc(last=1, every=4)
    assert steps == [1, 2, 3, 5, 6, 7, 9, 10]
    assert freed > 0
    assert same(again.restore(8), states[8])


def test_what_is_committed_later_is_what_was_given(
    tmp_path: Path, states: list[dict[str, torch.Tensor]]
) -> None:
    chain = tpde.Chain(tmp_path / "run.chain")
    for step, state in enumerate(states):
        given = {name: t.clone() for name, t in state.items()}
        done = chain.commit_later(step, given)
        for tensor in given.values():
            tensor.zero_()  # the next training step
    assert done.result().step == 11
    chain.wait()
    assert all(same(chain.restore(step), state) for step, state in enumerate(states))


def test_errors_say_what_there_is(tmp_path: Path, states: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(FormatError, match="chain init"):
        tpde.Chain(tmp_path / "nowhere", create=False)
    chain = tpde.Chain(tmp_path / "run.chain")
    with pytest.raises(ValueError, match="empty"):
        chain.restore()
    chain.commit(5, states[0])
    assert chain.commit(5, states[0]).step == 5, "the same state again"
    with pytest.raises(ValueError, match="another state"):
        chain.commit(5, states[1])
    with pytest.raises(ValueError, match="after step 5"):
        chain.commit(4, states[1])
    with pytest.raises(ValueError, match="holds step 5"):
        chain.restore(6)
    chain.commit_later(3, states[1])
    with pytest.raises(ValueError, match="after step 5"):
        chain.wait()
    for entry in (tmp_path / "run.chain" / "objects").iterdir():
        entry.write_bytes(b"not it")
    with pytest.raises((FormatError, TransferError)):
        chain.restore(5)
    other = tpde.Chain(tmp_path / "other.chain")
    other.commit(1, {"x": numpy.arange(6, dtype=numpy.float32)})
    assert torch.equal(other.restore(1)["x"], torch.arange(6, dtype=torch.float32))


class Losses(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 50, (8,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, callbacks: list[Any]) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    set_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    options = {"per_device_train_batch_size": 4, "max_steps": 8, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **options)
    model = GPT2LMHeadModel(GPT2Config(**sizes))  # with dropout: random state counts
    return Trainer(model=model, args=arguments, train_dataset=Losses(), callbacks=callbacks)


def test_a_run_taken_up_from_a_chain_ends_in_the_same_bits(tmp_path: Path) -> None:
    from overspill.chain_callback import ChainCallback

    saver = ChainCallback(tmp_path / "run.chain", every=3)
    whole = trainer(tmp_path / "a", [saver])
    whole.train()
    assert [step.step for step in saver.chain.log()] == [3, 6, 8]
    folder = ChainCallback(tmp_path / "run.chain").checkpoint(tmp_path / "resume", step=3)
    resumed = trainer(tmp_path / "b", [])
    resumed.train(resume_from_checkpoint=folder)
    assert resumed.state.global_step == 8
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert same(expected, found)
    assert same(saver.chain.restore(8), {name: t.clone() for name, t in expected.items()})
    # The test can fail: a run from other random numbers ends elsewhere.
    (Path(folder) / "rng_state.pth").unlink()
    elsewhere = trainer(tmp_path / "c", [])
    torch.manual_seed(99)
    elsewhere.train(resume_from_checkpoint=folder)
    assert not same(expected, elsewhere.model.state_dict())


def test_sharded_ranks_take_a_run_up_from_their_chains(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("chain_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folder = tmp_path / "run.chain"
    done = subprocess.run(
        [*launcher, str(worker), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    states = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("state ")]
    (whole,), (resumed,), (elsewhere,) = ([s for name, s in states if name == n] for n in ("a", "b", "c"))
    assert whole == resumed != elsewhere
    assert sorted(path.name for path in folder.iterdir()) == ["metadata", "rank-00000", "rank-00001"]
    parts = tpde.Chain(folder / "rank-00001", create=False).log()[-1].parts
    assert sorted(parts) == ["moments", "params"]


def test_a_step_without_its_metadata_is_not_there(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from overspill.chain_dcp import ChainReader, ChainWriter

    state = {"model": {"w": torch.arange(12.0).view(3, 4)}, "epoch": 5}
    for step in (1, 2):
        state["model"]["w"] += 1
        dcp.save(state, storage_writer=ChainWriter(tmp_path / "c", step=step), no_dist=True)
    loaded = {"model": {"w": torch.zeros(3, 4)}, "epoch": 0}
    dcp.load(loaded, storage_reader=ChainReader(tmp_path / "c", step=1), no_dist=True)
    assert loaded["epoch"] == 5
    assert torch.equal(loaded["model"]["w"], torch.arange(12.0).view(3, 4) + 1)
    # A crash between the ranks' commits and the coordinator's: the step is not the newest, and cannot be asked for.
    (tmp_path / "c" / "metadata" / "steps" / f"{2:020}.json").unlink()
    assert ChainReader(tmp_path / "c").step == 1
    with pytest.raises(ValueError, match=r"step 2 is asked for, complete are \[1\]"):
        ChainReader(tmp_path / "c", step=2)


def test_the_demo_keeps_its_steps(tmp_path: Path, states: list[dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import save_file

    from overspill.demo.chain import keep_in_chain, print_chain

    files = [tmp_path / f"{step}.safetensors" for step in range(4)]
    for path, state in zip(files, states, strict=False):
        save_file(state, path)
    report = keep_in_chain(files, tmp_path / "chain")
    print_chain(report)
    assert report["chain.bit_identical"]
    assert report["chain.restored_step"] == 2
    assert report["chain.ratio"] > 1.5
