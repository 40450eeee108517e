"""Two processes on this machine that train a dual encoder together; test_training compares them with one process.

A module of its own because the processes import what they run by name.
"""

import datetime
import os
import socket
from pathlib import Path

import stem_family
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from vit_embed import VitEmbedForContrastive

# Name: contrastive_loss, batch size of each process.
CASES = {
    "softmax, equal": ("softmax", (3, 3)),
    "softmax, unequal": ("softmax", (3, 2)),
    "sigmoid, equal": ("sigmoid", (3, 3)),
    "sigmoid, unequal": ("sigmoid", (2, 3)),
}
WORLD_SIZE = 2
TRAINER_EXAMPLES = 8


def make_model(contrastive_loss: str) -> VitEmbedForContrastive:
    return tiny.randomised(VitEmbedForContrastive(tiny.dual_config(contrastive_loss=contrastive_loss)))


def joined_batch(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny.pixels(size), "input_ids": tiny.tokens(size)}


def train_step(rank: int, contrastive_loss: str, sizes: tuple[int, ...]) -> tuple[torch.Tensor, dict]:
    """Loss and parameter gradients of one step on this process's rows of the joined batch."""
    start = sum(sizes[:rank])
    batch = {name: rows[start : start + sizes[rank]] for name, rows in joined_batch(sum(sizes)).items()}
    model = DistributedDataParallel(make_model(contrastive_loss))
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.module.named_parameters()}


def evaluate_with_trainer(folder: Path) -> tuple[dict[str, float], tuple]:
    """Metrics and embeddings of a stock Trainer that shares one batch among the processes."""
    dataset = Dataset.from_dict({name: rows.tolist() for name, rows in joined_batch(TRAINER_EXAMPLES).items()})
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_eval_batch_size=TRAINER_EXAMPLES // WORLD_SIZE,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=make_model("softmax"), args=arguments, eval_dataset=dataset)
    return trainer.evaluate(), trainer.predict(dataset).predictions


def train_family(rank: int) -> dict[str, bool]:
    """Whether every stem with every head that has a loss takes two steps, with equal gradients in both processes.

    A parameter that asks for a gradient and gets none makes the second step an error.
    """
    agree = {}
    for stem, head in stem_family.PAIRS:
        torch.manual_seed(rank)
        module = stem_family.build(stem, head, pooling_type="map")
        inputs = stem_family.inputs_of(head, module.config)
        if module(**inputs).get("loss") is None:
            continue
        model = DistributedDataParallel(module.train())
        for _ in range(2):
            model.zero_grad()
            model(**inputs).loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
        other = gradients.clone()
        dist.broadcast(other, src=0)
        agree[f"{stem}, {head}"] = bool(gradients.isfinite().all()) and torch.equal(gradients, other)
    return agree


def work(rank: int, port: int, folder: Path) -> None:
    """Runs every case; the last one writes what it found to `folder / "results.pt"`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=2))  # a process left alone gives up
    results = {name: train_step(rank, *case) for name, case in CASES.items()}
    results["family"] = train_family(rank)
    metrics, predictions = evaluate_with_trainer(folder)
    results["trainer"] = ({"eval_loss": metrics["eval_loss"]}, tuple(map(torch.from_numpy, predictions)))
    if rank == WORLD_SIZE - 1:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path) -> None:
    """Runs `work` in WORLD_SIZE processes and waits. An error in any of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port, folder), nprocs=WORLD_SIZE)
