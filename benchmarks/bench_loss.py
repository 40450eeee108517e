"""Memory and time of the contrastive loss on W processes with B pairs each, against open_clip's losses.

    python benchmarks/bench_loss.py --output benchmarks/loss.json

Forward and backward pass of the loss alone, from unit vectors of 512 numbers: softmax against open_clip's
`ClipLoss(local_loss=True, gather_with_grad=True)`, sigmoid against `SigLipLoss`. `gloo`: W processes of this machine;
first the gradients of both are compared with those of one process that has the whole batch, then processor time of a
process is taken and the bytes of its tensors. `count`: one process of W in the shape of its tensors alone (the meta
device, collectives that do nothing), for batches that no machine here holds: bytes, and FLOPs of the products.
"""

import argparse
import itertools
import logging
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from bench_memory import LiveBytes
from bench_text import open_clip_code
from timing import MIB, Ratios, about, interleave, machine, store, table, timed
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from vit_embed import VitEmbedConfig, contrastive_vit_embed
from vit_embed.contrastive_vit_embed import contrastive_loss

logger = logging.getLogger("bench_loss")

WIDTH = 512
LOSSES = ("softmax", "sigmoid")
SIDES = ("vit_embed", "open_clip")
START = {"softmax": (2.66, None), "sigmoid": (2.3, -10.0)}  # logit_scale and logit_bias of a new model
TOLERANCE = 1e-5  # of float32, relative: sums taken in another order
CELL = ("loss", "processes", "batch", "how", "what")

Inputs = list[torch.Tensor]  # images, texts (B, D), logit_scale, and of sigmoid logit_bias


def make_inputs(loss: str, rows: slice, num_all: int) -> Inputs:
    """Those rows of a batch that is the same in every process."""
    generator = torch.Generator().manual_seed(0)
    embeds = [F.normalize(torch.randn(num_all, WIDTH, generator=generator), dim=-1)[rows] for _ in range(2)]
    return [each.clone().requires_grad_() for each in (*embeds, *map(torch.tensor, filter(None, START[loss])))]


def loss_calls(loss: str, rank: int, processes: int) -> dict[str, Callable[..., torch.Tensor]]:
    """images, texts, logit_scale, logit_bias -> the loss of this process."""
    config = VitEmbedConfig(contrastive_loss=loss, text_config={})
    losses = open_clip_code().loss
    if loss == "softmax":
        theirs = losses.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=processes)
    else:
        theirs = losses.SigLipLoss(rank=rank, world_size=processes)

    def ours(images, texts, scale, bias=None) -> torch.Tensor:
        return contrastive_loss(config, None, images, texts, scale, bias, None, True)

    return {
        "vit_embed": ours,
        "open_clip": lambda images, texts, scale, bias=None: theirs(images, texts, scale.exp(), bias),
    }


def step(call: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    """Forward and backward pass, with new gradients."""
    for each in inputs:
        each.grad = None
    call(*inputs).backward()


def check_gradients(loss: str, calls: dict, inputs: Inputs, rows: slice, num_all: int) -> None:
    """Raises unless the mean over processes, as DistributedDataParallel takes it, is the gradient of one process with
    all rows."""
    whole = make_inputs(loss, slice(None), num_all)
    logits = whole[2].exp() * whole[0] @ whole[1].t()
    pairs = torch.arange(num_all)
    if loss == "softmax":
        total = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2
    else:
        total = -F.logsigmoid((2 * torch.eye(num_all) - 1) * (logits + whole[3])).sum() / num_all
    total.backward()
    expected = [whole[0].grad[rows], whole[1].grad[rows], *(each.grad for each in whole[2:])]
    for name, call in calls.items():
        step(call, inputs)
        for scalar in inputs[2:]:
            dist.all_reduce(scalar.grad)
        for what, each, right in zip(("images", "texts", "scale", "bias"), inputs, expected):
            difference = ((each.grad / dist.get_world_size() - right).norm() / right.norm()).item()
            if not difference <= TOLERANCE:
                raise RuntimeError(f"{loss}, {name}: gradients of {what} differ by {difference:.1e}")


def live_mib(call: Callable[..., torch.Tensor], inputs: Inputs) -> float:
    """The most bytes of tensors above the inputs, gradients among them."""
    for each in inputs:
        each.grad = None
    with LiveBytes(inputs) as live:
        call(*inputs).backward()
    return live.peak / MIB


def process(rank: int, loss: str, processes: int, batch: int, rounds: int, port: int, results) -> None:
    """One of W gloo processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    rows = slice(rank * batch, (rank + 1) * batch)
    inputs, calls = make_inputs(loss, rows, processes * batch), loss_calls(loss, rank, processes)
    check_gradients(loss, calls, inputs, rows, processes * batch)
    mib = {name: [live_mib(call, inputs)] for name, call in calls.items()}

    def together(call: Callable[..., torch.Tensor]) -> float:
        dist.barrier()
        return timed(lambda: step(call, inputs), time.process_time)()

    timers = {name: lambda c=call: together(c) for name, call in calls.items()}
    seconds = interleave(f"{loss}, {processes} x {batch}, rank {rank}", timers, rounds)
    if not rank:
        results.put((seconds, mib))
    dist.barrier()
    dist.destroy_process_group()


def measure(loss: str, processes: int, batch: int, rounds: int) -> dict[str, dict]:
    """Seconds and MiB of the first of W processes, which are all alike."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (loss, processes, batch, rounds, port, results)
    torch.multiprocessing.spawn(process, arguments, nprocs=processes, join=True)
    seconds, mib = results.get()
    return {"seconds": seconds, "mib": mib}


def exchanged(to_left: torch.Tensor, to_right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(to_right), torch.empty_like(to_left)


def count(loss: str, processes: int, batch: int) -> dict[str, dict]:
    """MiB and TFLOP of a process, by the shapes of its tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    losses = open_clip_code().loss
    found: dict[str, dict] = {"mib": {}, "tflop": {}}
    # What the meta device cannot do: tell a number, and send to a neighbour.
    with (
        mock.patch.object(contrastive_vit_embed, "gather_sizes", lambda *_: [batch] * processes),
        mock.patch.object(losses, "neighbour_exchange", lambda *given, **_: torch.empty_like(given[2])),
        mock.patch.object(losses, "neighbour_exchange_bidir", lambda *given, **_: exchanged(*given[2:4])),
    ):
        for name, call in loss_calls(loss, 0, processes).items():
            inputs = [each.detach().to("meta").requires_grad_() for each in make_inputs(loss, slice(batch), batch)]
            with torch.device("meta"):
                found["mib"][name] = [live_mib(call, inputs)]
                with FlopCounterMode(display=False) as counter:
                    step(call, inputs)
            found["tflop"][name] = [counter.get_total_flops() / 1e12]
    dist.destroy_process_group()
    return found


def lines(cells: list[dict]) -> list[tuple[str, ...]]:
    rows = []
    for cell in cells:
        (what,) = {"seconds", "mib", "tflop"} & set(cell)
        values = cell[what]
        medians = (f"{statistics.median(values[name]):.4g}" for name in SIDES)
        ratio, spread, _ = Ratios.of(values["vit_embed"], values["open_clip"]).cells(2)
        shape = f"{cell['processes']} x {cell['batch']}"
        rows.append((cell["loss"], shape, f"{what}, {cell['how']}", *medians, ratio, spread))
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256, 1024], help="pairs of a process")
    parser.add_argument("--counted", nargs=2, type=int, default=[64, 4096], help="processes and pairs of `count`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON; a file keeps its other cells")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cells = []
    shapes = [("gloo", *shape) for shape in itertools.product(args.processes, args.batches)]
    for loss, (how, *shape) in itertools.product(args.losses, [("count", *args.counted), *shapes]):
        found = count(loss, *shape) if how == "count" else measure(loss, *shape, args.rounds)
        shared = {"loss": loss, "processes": shape[0], "batch": shape[1], "how": how, "about": about("cpu")}
        cells += [{**shared, "what": what, what: each} for what, each in found.items()]
        if args.output:
            store(args.output, cells, CELL)
    header = ("loss", "processes x pairs", "of a process", *SIDES, "ratio", "range of ratios")
    sys.stdout.write(f"{machine()}\n\n{table(header, lines(cells))}\n")


if __name__ == "__main__":
    main()
