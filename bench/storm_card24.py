"""Two fine-tunes that 24 GB cannot hold, in 24 GB: all weights of a 1B shape, and a LoRA adapter of an 8B shape.

transformers' Llama, random weights, bf16, one long sequence, AdamW with 16-bit states, Liger's fused head and loss on all
sides where it loads (``peers`` folder). torch's allocator is held to 22 GiB, so that what does not fit fails as it
would there; NVML's log of STORM's run stands beside it. Every method of a case begins with the same weights; losses
are compared step by step. The card's own link and speed are not emulated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import time
import traceback
from typing import Any

import peft
import torch
from storm_evidence import Memory
from storm_parts import fused_loss, liger_loss
from storm_v1 import GB
from transformers import LlamaConfig, LlamaModel

from common import commit, row, update_results, write_series
from overspill import Storm
from overspill.errors import OverspillError

CARD_BYTES = 24 * 2**30
# A driver's context and cuBLAS take the rest.
TORCH_BYTES = 22 * 2**30
# Left to the gaps of torch's allocator.
GAPS_BYTES = 2**30


PEERS = ("checkpointing", "checkpointing + offload")


@dataclasses.dataclass
class Case:
    """One fine-tune, and what is tried at each length."""

    shape: dict[str, int]
    is_lora: bool
    what: str
    title: str
    methods: dict[int, tuple[str, ...]]


CASES = {
    "full": Case(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        False,
        "every weight of a 1.5B Llama",
        "a whole 1.5B Llama",
        {32_768: ("keep-all", *PEERS, "STORM"), 65_536: (*PEERS, "STORM", "STORM + checkpointing")},
    ),
    "lora": Case(
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        True,
        "a LoRA adapter (peft, r = 16, q and v) of an 8B Llama",
        "LoRA of an 8B Llama",
        {
            16_384: ("keep-all", *PEERS, "STORM", "STORM with codec", "STORM + checkpointing"),
            32_768: (*PEERS, "STORM + checkpointing"),
        },
    ),
}


@dataclasses.dataclass
class Seen:
    """What came of one method."""

    ms: float
    peak_bytes: int
    losses: list[float]


class Model(torch.nn.Module):
    """The model and its head, with a loss that does not hold all logits at once."""

    def __init__(self, case: Case, tokens: int, vocab: int) -> None:
        super().__init__()
        config = LlamaConfig(
            **case.shape, num_key_value_heads=8, vocab_size=vocab, use_cache=False, attn_implementation="sdpa",
            max_position_embeddings=tokens,
        )  # fmt: skip
        self.body = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, vocab, bias=False)
        if case.is_lora:
            adapter = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
            self.body = peft.get_peft_model(self.body, adapter)
            self.head.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=ids).last_hidden_state
        return fused_loss(hidden[0, :-1], self.head.weight, ids[0, 1:])


def train(model: Model, ids: torch.Tensor, context: Any, steps: int) -> Seen:
    """Median ms of the last three steps, and the most of torch's bytes in them; of two where there are no more."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=ids.is_cuda)
    times, losses = [], []
    last = min(3, steps - 1)
    with context:
        for n in range(steps):
            if n == steps - last and ids.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            loss = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.detach())
            del loss
            if ids.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else 0
    return Seen(statistics.median(times[-last:]), peak, [float(loss) for loss in losses])


def build(case: Case, tokens: int, options: argparse.Namespace) -> tuple[Model, torch.Tensor]:
    """The same weights and the same text each time."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = Model(case, tokens, options.vocab)
        ids = torch.randint(0, options.vocab, (1, tokens))
    torch.set_default_dtype(torch.float32)
    return model.train(), ids


def attempt(
    case: Case, tokens: int, method: str, options: argparse.Namespace
) -> tuple[Seen | str, dict[str, Any]]:
    """What came of a method, or why nothing did; and what STORM says of itself."""
    model = storm = ids = None
    begin = time.perf_counter()
    said: dict[str, Any] = {}
    try:
        model, ids = build(case, tokens, options)
        if "checkpointing" in method:
            model.body.gradient_checkpointing_enable(**({"offload": True} if "offload" in method else {}))
            if case.is_lora:
                model.body.enable_input_require_grads()
        if not method.startswith("STORM"):
            return train(model, ids, contextlib.nullcontext(), options.peer_steps), said
        budget = TORCH_BYTES - GAPS_BYTES if ids.is_cuda else None
        storm = Storm(model, vram_budget=budget, host_budget=options.host_budget, compress="codec" in method)
        with Memory() if ids.is_cuda else contextlib.nullcontext() as memory:
            seen = train(model, ids, storm, options.steps)
        storm.close()
        record = json.loads(storm._planner.record_json() or '{"units": []}')["units"]
        said["saved"] = sum(unit["bytes"] for unit in record if not unit["is_narrow"])
        said["plan"] = storm.report()["predicted"]
        if memory is not None:
            said["nvml"] = memory
        return seen, said
    except torch.OutOfMemoryError:
        return "out of memory", said
    except OverspillError as error:
        traceback.print_exc()
        return str(error)[:120], said
    finally:
        del model, storm, ids
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"    {method}: {time.perf_counter() - begin:.1f} s in all", flush=True)


def in_words(seen: Seen | str) -> str:
    """One method's outcome."""
    if isinstance(seen, str):
        return seen
    return f"{seen.ms:.0f} ms, {seen.peak_bytes / GB:.1f} GB, losses {[round(x, 4) for x in seen.losses[:3]]}"


def run(name: str, tokens: int, options: argparse.Namespace) -> None:
    """One case at one length; results are written after every method."""
    case = CASES[name]
    outcome: dict[str, Seen | str] = {}
    goal = f"storm_limit.card24_{name}_{tokens // 1024}k"
    note = ""
    for method in options.methods or case.methods[tokens]:
        outcome[method], said = attempt(case, options.tokens or tokens, method, options)
        print(
            f"card24 {name} {tokens}: {method}: {in_words(outcome[method])} {said.get('plan', '')}",
            flush=True,
        )
        peers = {m: s for m, s in outcome.items() if m in PEERS and isinstance(s, Seen)}
        peer = min(peers, key=lambda m: peers[m].ms) if peers else None
        own = {m: s for m, s in outcome.items() if m.startswith("STORM") and isinstance(s, Seen)}
        if not own:
            continue
        best = min(own, key=lambda m: own[m].ms)
        if method == best:
            plan = said["plan"]
            bound = plan["stall_us"] + plan["rebuild_us"] + plan["codec_us"]
            note = (
                f"{case.what}, random weights, bf16, one sequence of {options.tokens or tokens} tokens, AdamW in bf16, "
                f"{'its loss in pieces' if liger_loss() is None else 'Liger fused loss'}, torch held to {TORCH_BYTES / GB:.1f} GB; {{outcome}}; autograd saves {said['saved'] / GB:.1f} GB, "
                f"rebuilt {plan['rebuilt_bytes'] / GB:.1f}, offloaded {plan['offloaded_bytes'] / GB:.1f}, kept "
                f"{plan['kept_bytes'] / GB:.1f} GB"
            )
            limit = f"simulator: {plan['step_us'] / 1e3:.0f} ms, of which {bound / 1e3:.0f} ms are STORM's"
        words = "; ".join(f"{m}: {in_words(s)}" for m, s in outcome.items())
        rows = [
            row(
                f"{goal}.step_ms",
                own[best].ms,
                "ms",
                peer=peer,
                peer_value=peers[peer].ms if peer else None,
                limit=limit,
                note=note.format(outcome=words) + f" (commit {commit()[:10]})",
            )
        ]
        memory = said.get("nvml")
        if method == best and memory is not None:
            most = max(memory.used_bytes)
            rows.append(
                row(f"{goal}.nvml_gb_max", most / GB, "GB", limit="25.77", note=f"of the {method} run")
            )
            marks = [(CARD_BYTES, "24 GiB"), (said["saved"], "what autograd saves")]
            title = f"{method} in 24 GB: {case.title}, {tokens:,} tokens"
            write_series(f"storm_24gb_{name}_nvml", {**memory.log(), "marks": marks, "title": title})
        update_results(options.name, rows)


def agree(name: str, options: argparse.Namespace) -> None:
    """The same bits of every loss, by keep-all, checkpointing and STORM: four layers of a case, deterministic algorithms,
    at a third of the memory.
    """
    case = CASES[name]
    short = dataclasses.replace(case, shape={**case.shape, "num_hidden_layers": 4})
    losses: dict[str, list[float]] = {}
    budget, moved = None, {}
    torch.use_deterministic_algorithms(True)
    for method in ("keep-all", "checkpointing", "STORM"):
        model, ids = build(short, options.tokens or 4096, options)
        context: Any = contextlib.nullcontext()
        if method == "checkpointing":
            model.body.gradient_checkpointing_enable()
            if case.is_lora:
                model.body.enable_input_require_grads()
        elif method == "STORM":
            context = storm = Storm(model, vram_budget=budget, host_budget=options.host_budget)
        seen = train(model, ids, context, 6)
        losses[method] = seen.losses
        if method == "keep-all" and ids.is_cuda:
            fixed = torch.cuda.memory_allocated()
            budget = fixed + (seen.peak_bytes - fixed) // 3
        if method == "STORM":
            storm.close()
            moved = storm.report()["units"]
            del storm
        del model, ids, context
        gc.collect()
    torch.use_deterministic_algorithms(False)
    same = {m: found == losses["keep-all"] for m, found in losses.items()}
    note = (
        f"{case.what}, 4 layers of it, 4096 tokens, 6 steps, deterministic algorithms, a third of the memory: losses of "
        f"keep-all {losses['keep-all']}; the same bits: {same}; STORM's tensors {moved} (commit {commit()[:10]})"
    )
    print(f"card24 {name}: {note}", flush=True)
    share = sum(same.values()) / len(same)
    update_results(options.name, [row(f"storm_limit.card24_{name}.same_losses", share, "share", note=note)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--lengths", nargs="*", type=int, help="of the case's, these only")
    parser.add_argument("--agree", action="store_true", help="compare losses bit by bit instead")
    parser.add_argument("--methods", nargs="*", help="instead of the length's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, help="as many instead, where this is only tried out")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--steps", type=int, default=7, help="of STORM, which learns in the first four")
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument("--host-budget", default="64GiB")
    parser.add_argument("--name", default="storm_limit")
    options = parser.parse_args()
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(TORCH_BYTES / total)
    for name in options.cases:
        if options.agree:
            agree(name, options)
            continue
        for tokens in options.lengths or CASES[name].methods:
            if tokens in CASES[name].methods:
                run(name, tokens, options)


if __name__ == "__main__":
    main()
