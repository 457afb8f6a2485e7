"""Weight sync: a trainer ships each optimizer step as a patch, a server applies it to its resident weights.

    python examples/weight_sync.py [--device cuda] [--steps 5] [--lr 1e-6]

Two processes and a socket between them. The trainer keeps fp32 masters and the bf16 weights of the last step; it casts
the masters and encodes what changed where the weights lie, on CUDA without bringing them down. The server receives the
patch in page-locked memory, patches its model where it lies and answers with the state it is then in, which must be
the trainer's. What would be sent without patches is printed beside what was. Weights and data are random.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

from overspill import tpde


def build(width: int) -> torch.nn.Module:
    """The model that both sides start from."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)]
    return torch.nn.Sequential(torch.nn.Embedding(1000, width), *layers)


def bf16_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the server runs: the masters cast to bf16, where they are."""
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def serve(patches: Connection, width: int, device: str) -> None:
    """Applies every patch that comes and answers with the state's id and the seconds it took."""
    model = build(width).to(torch.bfloat16).to(device)
    while nbytes := patches.recv():
        received = tpde.host_buffer(nbytes, device)
        patches.recv_bytes_into(received)
        begin = time.perf_counter()
        state = tpde.open(received).apply_(model)
        patches.send((state, time.perf_counter() - begin))
    patches.send(tpde.state_id(model.state_dict()))


def main() -> None:
    """The trainer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="where the weights of both lie")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-6)
    args = parser.parse_args()

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, args.width, args.device)
    )
    server.start()
    trainer = build(args.width).to(args.device)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=args.lr)
    resident = bf16_state(trainer)
    state = tpde.state_id(resident)
    for step in range(args.steps):
        loss = trainer(torch.randint(1000, (64,), device=args.device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        begin = time.perf_counter()
        final = bf16_state(trainer)
        packed = tpde.encode(resident, final, base_id=state)
        encoded = time.perf_counter() - begin
        assert packed.data is not None
        ours.send(len(packed.data))
        ours.send_bytes(packed.data)
        state, applied = ours.recv()
        assert state == packed.final_id, "the server is in another state"
        resident = final
        print(
            f"step {step}: {packed.packed_bytes:,} bytes instead of {packed.raw_bytes:,} "
            f"({packed.ratio:.1f}:1), encoded in {encoded * 1e3:.1f} ms, applied in {applied * 1e3:.1f} ms"
        )
    ours.send(0)
    assert ours.recv() == tpde.state_id(resident), "the server's weights are not the trainer's"
    server.join()
    print("the server's weights are the trainer's, bit for bit")


if __name__ == "__main__":
    main()
