"""A model larger than its budget of device memory: weights packed in host memory, rebuilt layer by layer.

    python examples/stream_model.py [FOLDER] [--vram-budget 8GB] [--tokens 16] [--device cuda]

FOLDER is a model of the transformers library on disk; without one a small Llama with random weights is made. It
generates with its weights where they are, then streamed under the budget, and the tokens must be the same. On CUDA
bf16 is the type to take (packed to about two thirds); a model that is already in 4 bits gains nothing.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from overspill import tpde


def load(folder: str | None) -> torch.nn.Module:
    """The model, on the CPU."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).eval()


def main() -> None:
    """Generates twice and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--vram-budget", default="8MB")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load(args.folder)
    options = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[1, 2, 3, 4]])

    handle = tpde.stream(model, args.vram_budget, device=args.device)
    streamed = model.generate(ids.to(args.device), **options).cpu()
    report = handle.report()
    handle.close()  # the model has its weights again
    print(f"weights: {report['raw_bytes'] / 1e6:.1f} MB, packed {report['packed_bytes'] / 1e6:.1f} MB")
    print(f"held on the device: {(report['resident_bytes'] + report['ring_bytes']) / 1e6:.1f} MB of them")
    print(f"crossed the link: {report['link_bytes'] / 1e6:.1f} MB")

    plain = model.to(args.device).generate(ids.to(args.device), **options).cpu()
    if not torch.equal(streamed, plain):
        raise SystemExit("the tokens differ")
    print("the same tokens as with all weights resident")


if __name__ == "__main__":
    main()
