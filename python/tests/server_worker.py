"""Forks servers of a tiny random model, one for each line of JSON on standard input.

A line is the server's configuration and what of the model is asked for; ``{"wait": PID}`` waits for a server to end.
The answer is one line of JSON. Nothing is computed before the fork, so that no thread is lost in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from overspill import serve
from overspill.djinn import SessionPool
from overspill.serve.executor import SessionExecutor

LAYERS, HIDDEN, TOKENS = 4, 32, 160
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three that are not text."""
    alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    return tokenizer


def tiny_model() -> LlamaForCausalLM:
    """The same random weights each time, which look at their past."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=258, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


def tiny_executor(slabs: int = 2, host_budget: str = "8MiB", spill_dir: str | None = None) -> SessionExecutor:
    """With room on the device for ``slabs`` sessions."""
    model, options = (
        tiny_model(),
        {"session_tokens": TOKENS, "host_budget": host_budget, "spill_dir": spill_dir},
    )
    slab_bytes = SessionPool(model, arena_budget="16MiB", **options).report()["slab_bytes"]
    pool = SessionPool(model, arena_budget=slabs * slab_bytes, **options)
    return SessionExecutor(pool, tiny_tokenizer())


class Scripted(SessionExecutor):
    """Says what a script says, one after the other, whatever the model would."""

    script: list[str]

    def _choose(self, seat: Any, sampler: Any, logits: torch.Tensor) -> dict[str, Any]:
        if not seat.transcript.reply:
            seat.words = [*self.tokenizer.encode(self.script.pop(0)), 256]
        logits = torch.zeros_like(logits)
        logits[seat.words[len(seat.transcript.reply)]] = 1e4
        return super()._choose(seat, sampler, logits)


def run(asked: dict[str, Any]) -> None:
    """Is one server."""
    torch.set_num_threads(1)
    executor = tiny_executor(**asked.get("model", {}))
    if "script" in asked:
        executor.__class__, executor.script = Scripted, asked["script"]  # type: ignore[attr-defined]
    if "log" in asked:
        sys.stderr = open(asked["log"], "a")  # noqa: SIM115 - as long as the process
        os.dup2(sys.stderr.fileno(), 2)
    config = {"bind": "127.0.0.1:0", "keys": [], "state_dir": None, **asked["config"]}
    serve.run(executor, "tiny", config)


def main() -> None:
    """See the module."""
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(json.dumps({"pid": pid}), flush=True)
            continue
        code = 1
        try:
            sys.stdin.close()
            run(asked)
            code = 0
        except BaseException as error:
            print(f"failed: {error}", flush=True)
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
