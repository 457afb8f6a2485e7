"""The models that STORM is tested on: small, seeded, and each of a kind that has broken offloading before.

A workload is a builder: given a device it returns a :class:`Workload`, whose ``step`` runs one training
step's forward and backward and returns the loss. The caller owns the seed, the optimizer and the
comparison (``storm_harness``); nothing here knows of overspill. Weights are random, batches are drawn
from a generator seeded with the step number, so two runs of one workload see the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BUILDERS: dict[str, Callable[[str], Workload]] = {}


@dataclass
class Workload:
    """One model and what a step of it does."""

    model: nn.Module
    step: Callable[[int], Tensor]
    """Forward and backward of step ``n``; gradients are left in ``.grad``; returns the loss, detached."""


def workload(build: Callable[[str], Workload]) -> Callable[[str], Workload]:
    """Registers ``build`` under its name."""
    BUILDERS[build.__name__] = build
    return build


class Batch:
    """Random numbers of one step, drawn on the CPU so that every device sees the same."""

    def __init__(self, step: int, device: str) -> None:
        self._generator = torch.Generator().manual_seed(1_000 + step)
        self._device = device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal fp32."""
        return torch.randn(*shape, generator=self._generator).to(self._device)

    def ints(self, high: int, *shape: int) -> Tensor:
        """Uniform int64 below ``high``."""
        return torch.randint(high, shape, generator=self._generator).to(self._device)

    def bools(self, *shape: int) -> Tensor:
        """True with probability one half."""
        return self.normal(*shape) > 0


def simple(model: nn.Module, device: str, loss: Callable[[Batch], Tensor]) -> Workload:
    """A workload whose step is ``loss(batch).backward()``."""
    model.to(device)

    def step(n: int) -> Tensor:
        out = loss(Batch(n, device))
        out.backward()
        return out.detach()

    return Workload(model, step)


def mlp_layers(*, dropout: float = 0.0) -> nn.Sequential:
    """A small MLP with every common activation in it."""
    return nn.Sequential(
        nn.Linear(24, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.SiLU(),
        nn.LayerNorm(64), nn.Linear(64, 48), nn.Tanh(), nn.Dropout(dropout), nn.Linear(48, 8),
    )  # fmt: skip


@workload
def mlp(device: str) -> Workload:
    """Linear layers, activations whose node saves its own output, a norm."""
    model = mlp_layers()
    return simple(model, device, lambda b: F.cross_entropy(model(b.normal(16, 24)), b.ints(8, 16)))


# --- transformers ---------------------------------------------------------------------------------


def tiny_llama() -> nn.Module:
    """Grouped-query attention, rotary embedding, SwiGLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def causal_lm(model: nn.Module, device: str) -> Workload:
    """Next-token loss on random tokens, the last ones of each row padded away."""

    def loss(b: Batch) -> Tensor:
        ids = b.ints(64, 2, 12)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    return simple(model.train(), device, loss)


@workload
def llama(device: str) -> Workload:
    """transformers' Llama."""
    return causal_lm(tiny_llama(), device)


@workload
def gpt2(device: str) -> Workload:
    """transformers' GPT-2: Conv1D layers, tied embeddings, dropout 0.1 everywhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return causal_lm(GPT2LMHeadModel(config), device)


@workload
def t5(device: str) -> Workload:
    """transformers' T5: encoder, decoder and cross attention share saved tensors."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip

    def loss(b: Batch) -> Tensor:
        return model(input_ids=b.ints(64, 2, 10), labels=b.ints(64, 2, 6), use_cache=False).loss

    return simple(model.train(), device, loss)


@workload
def vit(device: str) -> Workload:
    """transformers' ViT: a strided convolution into tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=16, patch_size=4, num_labels=5, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip
    return simple(
        model.train(), device, lambda b: model(pixel_values=b.normal(2, 3, 16, 16), labels=b.ints(5, 2)).loss
    )


@workload
def moe(device: str) -> Workload:
    """transformers' Mixtral with its router loss: saved shapes change from step to step."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return causal_lm(
        MixtralForCausalLM(
            MixtralConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
                router_aux_loss_coef=0.1, sliding_window=None,
            )
        ),
        device,
    )  # fmt: skip


@workload
def lora(device: str) -> Workload:
    """peft's LoRA on a frozen Llama: frozen weights are saved through views that require no gradient."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            tiny_llama(),
            LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]),
        )
    return causal_lm(adapted, device)


# --- other families -------------------------------------------------------------------------------


@workload
def lstm(device: str) -> Workload:
    """A two-layer bidirectional LSTM over padded sequences."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(12, 20, 2, batch_first=True, bidirectional=True, dropout=0.2)
            self.head = nn.Linear(40, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            out, (h, c) = self.rnn(packed)
            padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
            return self.head(padded).mean(1) + h.sum() * 1e-3 + c.sum() * 1e-3

    model = Tagger()
    lengths = torch.tensor([9, 7, 4])
    return simple(model, device, lambda b: F.cross_entropy(model(b.normal(3, 9, 12), lengths), b.ints(5, 3)))


@workload
def conv_bn(device: str) -> Workload:
    """Convolutions, batch norm (buffers written in place in forward), pooling indices, channels_last."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=2), nn.GroupNorm(4, 16), nn.LeakyReLU(0.1, inplace=True),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 4),
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss(b: Batch) -> Tensor:
        x = b.normal(4, 3, 12, 12).to(memory_format=torch.channels_last)
        return F.cross_entropy(model(x), b.ints(4, 4))

    return simple(model, device, loss)


@workload
def tied(device: str) -> Workload:
    """One weight used as embedding, as a layer twice, and transposed as the head."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 40)
            self.layer = nn.Linear(40, 40)
            self.again = nn.Linear(40, 40)
            self.again.weight = self.layer.weight
            self.head = nn.Linear(40, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = torch.tanh(self.layer(self.embed(ids)))
            return self.head(torch.sigmoid(self.again(x)) @ self.layer.weight.t())

    model = Tied()
    return simple(
        model, device, lambda b: F.cross_entropy(model(b.ints(40, 4, 6)).flatten(0, 1), b.ints(40, 24))
    )


@workload
def dropout(device: str) -> Workload:
    """Every kind of dropout: random masks are saved, and must not be drawn again."""
    model = nn.Sequential(
        nn.Linear(24, 64), nn.Dropout(0.3), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(64, 64),
        nn.FeatureAlphaDropout(0.1), nn.ReLU6(), nn.Unflatten(1, (16, 4)), nn.Dropout1d(0.2),
        nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip
    return simple(model, device, lambda b: F.cross_entropy(model(b.normal(16, 24)), b.ints(8, 16)))


@workload
def masks(device: str) -> Workload:
    """Bool, uint8 and int64 tensors among the saved ones."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 32, padding_idx=0)
            self.mix = nn.Linear(32, 32)
            self.head = nn.Linear(32, 6)

        def forward(self, ids: Tensor, keep: Tensor, order: Tensor) -> Tensor:
            x = self.mix(self.embed(ids))
            x = torch.where(keep[..., None], x, x.sin())
            scores = (x @ x.transpose(1, 2)).masked_fill(~keep[:, None, :], -1e4)
            x = (
                F.scaled_dot_product_attention(x, x, x, attn_mask=keep[:, None, :] | keep[:, :, None])
                + scores.softmax(-1) @ x
            )
            x = x.gather(1, order[..., None].expand_as(x))
            x = x.index_add(1, order[0], x) * keep.to(torch.uint8)[..., None]
            top, _ = x.sort(dim=1)
            return self.head(top.cummax(1).values.amax(1) + x[keep].mean(0))

    model = Masked()

    def loss(b: Batch) -> Tensor:
        ids, keep = b.ints(30, 3, 8), b.bools(3, 8)
        keep[:, 0] = True
        order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        return F.cross_entropy(model(ids, keep, order.to(device)), b.ints(6, 3))

    return simple(model, device, loss)


class Block(nn.Module):
    """A residual block of which the checkpointed workloads stack three."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(torch.exp(-F.gelu(self.up(self.norm(x))))), 0.1)


def checkpointed(device: str, *, reentrant: bool) -> Workload:
    """Blocks that are recomputed in backward, between ones that are not."""
    model = nn.ModuleList([nn.Linear(16, 32), Block(), Block(), Block(), nn.Linear(32, 4)])

    def loss(b: Batch) -> Tensor:
        x = model[0](b.normal(8, 16)).tanh()
        x = checkpoint(model[1], x, use_reentrant=reentrant)
        x = checkpoint(model[3], model[2](x), use_reentrant=reentrant)
        return F.cross_entropy(model[4](x), b.ints(4, 8))

    return simple(model, device, loss)


@workload
def checkpoint_reentrant(device: str) -> Workload:
    """Gradient checkpointing that runs a backward inside the backward."""
    return checkpointed(device, reentrant=True)


@workload
def checkpoint_nonreentrant(device: str) -> Workload:
    """Gradient checkpointing that is itself made of saved-tensor hooks, inside STORM's."""
    return checkpointed(device, reentrant=False)


# --- ways of calling backward ---------------------------------------------------------------------


@workload
def retain_graph(device: str) -> Workload:
    """Two losses of one graph: what the first backward fetched is needed again."""
    model = mlp_layers().to(device)

    def step(n: int) -> Tensor:
        b = Batch(n, device)
        out = model(b.normal(16, 24))
        first, second = out.pow(2).mean(), F.cross_entropy(out, b.ints(8, 16))
        first.backward(retain_graph=True)
        second.backward(retain_graph=True)
        (first * second).backward()
        return (first + second).detach()

    return Workload(model, step)


@workload
def double_backward(device: str) -> Workload:
    """A gradient penalty: backward packs tensors of its own and is itself differentiated."""
    model = nn.Sequential(nn.Linear(24, 48), nn.Softplus(), nn.Linear(48, 48), nn.Sigmoid(), nn.Linear(48, 1))
    model.to(device)

    def step(n: int) -> Tensor:
        x = Batch(n, device).normal(16, 24).requires_grad_()
        out = model(x).exp().sum()
        (gx,) = torch.autograd.grad(out, x, create_graph=True)
        loss = out * 1e-2 + (gx.norm(dim=1) - 1).pow(2).mean()
        loss.backward()
        return loss.detach()

    return Workload(model, step)


@workload
def many_forwards(device: str) -> Workload:
    """Four forwards, then their backwards in an order that is not last in, first out."""
    model = mlp_layers(dropout=0.1).to(device)

    def step(n: int) -> Tensor:
        b = Batch(n, device)
        losses = [F.cross_entropy(model(b.normal(8 + 4 * i, 24)), b.ints(8, 8 + 4 * i)) for i in range(4)]
        losses[2].backward()
        losses[0].backward()
        (losses[1] + losses[3]).backward()
        return torch.stack([loss.detach() for loss in losses]).sum()

    return Workload(model, step)


@workload
def abandoned(device: str) -> Workload:
    """Graphs dropped without a backward, and one whose backward reaches half of it."""
    model = mlp_layers().to(device)

    def step(n: int) -> Tensor:
        b = Batch(n, device)
        dropped = model(b.normal(16, 24))
        half = model[:4](b.normal(16, 24))
        aside = model[4:](half)
        loss = half.pow(2).mean() + F.cross_entropy(model(b.normal(16, 24)), b.ints(8, 16))
        del dropped
        loss.backward()
        return loss.detach() + aside.detach().sum() * 0

    return Workload(model, step)


@workload
def gan(device: str) -> Workload:
    """Two models, two losses, one graph cut by detach and one that is not."""
    model = nn.ModuleDict(
        {
            "make": nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh()),
            "judge": nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)),
        }
    ).to(device)

    def step(n: int) -> Tensor:
        b = Batch(n, device)
        fake, real = model["make"](b.normal(12, 8)), b.normal(12, 16)
        judged = F.softplus(model["judge"](fake.detach())).mean() + F.softplus(-model["judge"](real)).mean()
        judged.backward()
        fooled = F.softplus(-model["judge"](fake)).mean()
        fooled.backward()
        return (judged + fooled).detach()

    return Workload(model, step)


# --- what is saved, and how it lies in memory -----------------------------------------------------


class StridedSaves(torch.autograd.Function):
    """Saves an input, an output, and three intermediates that are no tensor's history: strided views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        work = x.sin().t().contiguous()
        grown = x.exp()
        ctx.save_for_backward(x, grown, work.t(), work[::2], None, work.view(-1)[3:].unfold(0, 4, 2))
        return work.t().cos(), grown

    @staticmethod
    def backward(ctx: Any, g_cos: Tensor, g_exp: Tensor) -> Tensor:
        x, grown, work_t, half, nothing, windows = ctx.saved_tensors
        again = ctx.saved_tensors
        assert nothing is None
        assert work_t.stride() == (1, x.shape[0])
        assert windows.stride() == (2, 1)
        grad = -g_cos * work_t.sin() * x.cos() + g_exp * again[1]
        return grad + half.sum() * 1e-2 + windows.mean() * grown * 1e-2


@workload
def custom_function(device: str) -> Workload:
    """A custom Function with non-contiguous saves."""
    model = nn.ModuleList([nn.Linear(20, 24), nn.Linear(48, 4)])

    def loss(b: Batch) -> Tensor:
        a, c = StridedSaves.apply(model[0](b.normal(16, 20)))
        return F.cross_entropy(model[1](torch.cat([a, c], 1)), b.ints(4, 16))

    return simple(model, device, loss)


@workload
def views(device: str) -> Workload:
    """Expanded, overlapping, offset, transposed, negative and conjugated views, saved beside their base."""
    model = nn.ModuleList([nn.Linear(16, 48), nn.Linear(16, 4)])

    def loss(b: Batch) -> Tensor:
        x = model[0](b.normal(6, 16))
        q, k, v = x.chunk(3, dim=1)
        bias = q.mean(0, keepdim=True).expand(6, 16)
        windows = k.unfold(1, 4, 2) * v.unfold(1, 4, 2)
        overlap = torch.as_strided(q, (5, 8), (q.stride(0), 1), 3).pow(2)
        folded = (bias * q).view(6, 4, 4).permute(2, 0, 1).sigmoid() * windows.mean((1, 2))[:, None]
        freq = torch.fft.rfft(v + bias)
        power = (
            (freq * freq.conj()).real.sum()
            + (freq.conj().imag * freq.imag).sum()
            + torch.view_as_real(freq).prod()
        )
        diagonal = torch.diagonal(x[:, 5:11]) * torch.diagonal(x[:, 6:12]).flip(0)
        out = model[1](folded.permute(1, 2, 0).reshape(6, 16) + v * x[:1, 7:23].expand(6, -1))
        # Bounded, or a few hundred steps end in NaNs.
        return F.cross_entropy(out, b.ints(4, 6)) + overlap.mean() + (power * 1e-3 + diagonal.sum()).sin()

    return simple(model, device, loss)


@workload
def inplace(device: str) -> Workload:
    """In-place writes that autograd allows: outputs that save themselves, views of one base, out of order."""
    model = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)])

    def loss(b: Batch) -> Tensor:
        x = model[0](b.normal(6, 16)).relu_()
        y = model[1](x)
        y[:, ::2].mul_(0.5)
        z = F.dropout(y + 0, 0.2, inplace=True)
        z[:, 1::2].exp_()
        grown = torch.zeros(6, 32, device=device)
        grown[:, :16] = z[:, 16:] * x[:, :16]
        grown[:, 16:] = x[:, 16:].sigmoid()
        return F.cross_entropy(model[2](grown), b.ints(4, 6))

    return simple(model, device, loss)


@workload
def odd_tensors(device: str) -> Workload:
    """Sparse operands and gradients, zero-size and zero-dimensional tensors, wrapped numbers."""
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16, sparse=True), "lin": nn.Linear(16, 4)})
    adjacency = (torch.arange(64).view(8, 8) % 3 == 0).float().to_sparse().to(device)

    def loss(b: Batch) -> Tensor:
        x = torch.sparse.mm(adjacency, model["embed"](b.ints(50, 8)))
        scale = x.norm() * x.new_tensor(0.5)
        nothing = model["lin"](x[:0].exp()).prod()
        return F.cross_entropy(model["lin"](x / scale), b.ints(4, 8)) * nothing * 2 + (x**3).mean()

    return simple(model, device, loss)


@workload
def autocast(device: str) -> Workload:
    """bf16 autocast: casts of weights and activations are saved, the weights themselves are not."""
    model = mlp_layers(dropout=0.1)
    kind = torch.device(device).type

    def loss(b: Batch) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            out = model(b.normal(8, 24))
        return F.cross_entropy(out.float(), b.ints(8, 8))

    return simple(model, device, loss)


@workload
def compiled(device: str) -> Workload:
    """A torch.compile'd sub-module between eager ones."""
    model = nn.ModuleList([nn.Linear(16, 32), Feed(), nn.Linear(32, 4)])
    middle = torch.compile(model[1])

    def loss(b: Batch) -> Tensor:
        return F.cross_entropy(model[2](middle(model[0](b.normal(8, 16)).tanh())), b.ints(4, 8))

    return simple(model, device, loss)


class Feed(nn.Module):
    """What ``compiled`` compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.gate = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(self.norm(x))))


def names() -> Iterator[str]:
    """Every registered workload."""
    return iter(BUILDERS)
