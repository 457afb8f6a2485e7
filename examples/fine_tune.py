"""One tiny Llama, fine-tuned with and without STORM by transformers' Trainer, by accelerate, and with a LoRA
adapter of peft: the same bits each time.

    python examples/fine_tune.py [--vram-budget 12GiB] [--how trainer accelerate peft]

Without a GPU the budget counts the process's own memory. Weights and text are random: this shows where the
context goes, not a speed.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from typing import Any

import accelerate
import peft
import torch
import transformers
from torch.utils.data import DataLoader

from overspill import Storm
from overspill.trainer import StormCallback

TEXT = torch.randint(0, 512, (12, 64), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": ids, "labels": ids} for ids in TEXT]


def tiny_llama() -> torch.nn.Module:
    """Two layers, random weights."""
    transformers.set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def with_trainer(model: torch.nn.Module, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """A callback is all; ``options`` None trains without."""
    storm = None if options is None else StormCallback(**options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            max_steps=5,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
        callbacks = [] if storm is None else [storm]
        transformers.Trainer(model, arguments, train_dataset=DATA, callbacks=callbacks).train()
    return storm.storm.report() if storm is not None and storm.storm is not None else None


def with_accelerate(model: torch.nn.Module, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The context goes around the loop, over the model that ``prepare`` gave."""
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(DATA, batch_size=2))
    context: Any = contextlib.nullcontext() if options is None else Storm(model, **options)
    with context as storm:
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
    return None if storm is None else storm.report()


def with_peft(model: torch.nn.Module, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """An adapter changes nothing: the frozen weights are parameters and stay."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return with_accelerate(peft.get_peft_model(model, config), options)


HOW = {"trainer": with_trainer, "accelerate": with_accelerate, "peft": with_peft}


def main() -> None:
    """Compares every way asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vram-budget", default=None, help="default: what is free, less a tenth")
    parser.add_argument("--how", nargs="*", choices=list(HOW), default=list(HOW))
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    for how in options.how:
        plain, under = tiny_llama(), tiny_llama()
        HOW[how](plain, None)
        report = HOW[how](under, {"vram_budget": options.vram_budget, "min_bytes": 4096})
        pairs = zip(plain.state_dict().items(), under.state_dict().values(), strict=True)
        different = [name for (name, a), b in pairs if not torch.equal(a, b)]
        if different or report is None:
            raise SystemExit(f"{how}: {len(different)} weights differ: {different[:3]}")
        print(f"{how}: the same weights, bit for bit; {report['units']}")


if __name__ == "__main__":
    main()
