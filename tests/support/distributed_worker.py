"""Two processes on this machine that train a dual encoder together; test_distributed compares them with one process.

A module of its own because the processes import what they run by name.
"""

import datetime
import faulthandler
import os
import socket
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import stem_family
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from catalogue import CLASSES, SHALLOW, dual, flat, vision
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from vit_embed import VitEmbedForContrastive, VitEmbedForImageClassification, contrastive_vit_embed


class Case(NamedTuple):
    """A step that two processes take together.

    sizes: rows of each. fields: of the config. grouped: whether the batch has group_ids, with groups in both. sharded:
    whether the parameters are spread over the processes, by `fully_shard`.
    """

    sizes: tuple[int, int]
    fields: dict[str, Any] = {}
    grouped: bool = False
    sharded: bool = False


SIGMOID = {"contrastive_loss": "sigmoid"}
CASES = {
    "softmax, equal": Case((3, 3)),
    "softmax, unequal": Case((3, 2)),
    "sigmoid, unequal": Case((2, 3), SIGMOID),
    "softmax, groups, unequal": Case((4, 1), grouped=True),
    "sigmoid, groups, unequal": Case((2, 3), SIGMOID, grouped=True),
    "hard negatives, groups, unequal": Case((2, 3), {"hard_negative_beta": 0.5}, grouped=True),
    "chunks, sigmoid, unequal": Case((5, 2), {"contrastive_chunk_size": 2, **SIGMOID}),
    "chunks, hard negatives, groups, unequal": Case(
        (1, 6), {"contrastive_chunk_size": 2, "hard_negative_beta": 0.5}, grouped=True
    ),
    "sharded": Case((3, 3), grouped=True, sharded=True),
    "sharded, chunks": Case((4, 4), {"contrastive_chunk_size": 2}, grouped=True, sharded=True),
}
WORLD_SIZE = 2
TRAINER_EXAMPLES = 8
TRAINER_STEPS = 3


def make_model(**fields) -> VitEmbedForContrastive:
    return tiny.randomised(VitEmbedForContrastive(dual(**fields))).train()


def joined_batch(size: int, grouped: bool = False) -> dict[str, torch.Tensor]:
    """Rows of all processes; with groups, every third pair is of one group and all others of none."""
    batch = {"pixel_values": tiny.pixels(size), "input_ids": tiny.tokens(size)}
    number = torch.arange(size)
    return {**batch, "group_ids": torch.where(number % 3 == 0, -1, 2**40 + number)} if grouped else batch


def shard(model: VitEmbedForContrastive) -> VitEmbedForContrastive:
    """The model with its parameters spread over the processes. Scalars stay whole, as FSDP cannot shard them: the loss
    of the joined batch gives every process the whole gradient of them."""
    mesh = dist.init_device_mesh("cpu", (WORLD_SIZE,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    for tower in ("vision_model", "text_model"):
        if hasattr(model, tower):
            fully_shard(getattr(model, tower), mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.dim() == 0})


def shard_class(name: str) -> dict[str, torch.Tensor]:
    """What a class gives in evaluation, and its gradients, with towers, layers and embeddings as units of FSDP 2."""
    case = CLASSES[name]
    model = shard(case.model())
    assert all(isinstance(p, DTensor) for p in model.parameters() if p.dim())
    with torch.no_grad():
        found = dict(enumerate(flat(model(**case.inputs()), case.outputs)))
    if case.labels:
        model.train()(**case.training_inputs()).loss.backward()
        gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
        found.update({path: g.full_tensor() if isinstance(g, DTensor) else g for path, g in gradients.items()})
    return found


def evaluate_alone(rank: int) -> list[float]:
    """Losses of evaluation: rank 0 has two batches of 3, rank 1 one of 2 and no more; nobody waits for the other."""
    model = make_model().eval()
    with torch.no_grad():
        sizes = (3, 3) if rank == 0 else (2,)
        return [model(**joined_batch(size)).loss.item() for size in sizes]


def train_with_ignored_labels(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Weights after one step on 8 rows, of which the last process has most labels."""
    torch.manual_seed(0)
    model = VitEmbedForImageClassification(vision(num_labels=3))
    labels = [0, -100, -100, -100, 1, 2, 0, 1]
    rows = [{"pixel_values": p, "labels": label} for p, label in zip(tiny.pixels(8), labels)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // processes,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    return {name: values.clone() for name, values in model.state_dict().items()}


def train_step(rank: int, case: Case) -> tuple[torch.Tensor, dict]:
    """Loss and parameter gradients of one step on this process's rows of the joined batch, whose logits are there for
    one or two rows at a time."""
    contrastive_vit_embed.CELLS_ON_A_CPU, contrastive_vit_embed.LEAST_ROWS = 12, 1
    start = sum(case.sizes[:rank])
    joined = joined_batch(sum(case.sizes), case.grouped)
    batch = {name: rows[start : start + case.sizes[rank]] for name, rows in joined.items()}
    module = make_model(**case.fields)
    model = shard(module) if case.sharded else DistributedDataParallel(module)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return loss.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


def make_trainer(folder: Path, processes: int, **fields) -> Trainer:
    """A stock Trainer of one batch of all the data, shared among the processes: their order does not matter."""
    columns = joined_batch(TRAINER_EXAMPLES, grouped=True)
    dataset = Dataset.from_dict({name: rows.tolist() for name, rows in columns.items()})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=TRAINER_EXAMPLES // processes,
        per_device_eval_batch_size=TRAINER_EXAMPLES // processes,
        max_steps=TRAINER_STEPS,
        optim="sgd",
        learning_rate=0.02,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model=make_model(**fields), args=arguments, train_dataset=dataset, eval_dataset=dataset)


def run_trainer(folder: Path) -> dict[str, Any]:
    """What a stock Trainer gives on several processes: metrics and embeddings, and the weights after a few steps."""
    evaluation = make_trainer(folder / "evaluation", WORLD_SIZE)
    eval_loss = evaluation.evaluate()["eval_loss"]
    predictions = tuple(map(torch.from_numpy, evaluation.predict(evaluation.eval_dataset).predictions))
    # Another one: a model that accelerate has prepared for evaluation is not wrapped, so not synchronised, any more.
    training = make_trainer(folder / "training", WORLD_SIZE, contrastive_chunk_size=2)
    training.train()
    weights = training.accelerator.unwrap_model(training.model).state_dict()
    return {"eval_loss": eval_loss, "predictions": predictions, "weights": weights}


def train_family(rank: int) -> dict[str, bool]:
    """Whether every stem with every head that has a loss takes two steps, with equal gradients in both processes.

    A parameter that asks for a gradient and gets none makes the second step an error.
    """
    agree = {}
    for stem, head in stem_family.PAIRS:
        torch.manual_seed(rank)
        layers = {} if head in ("depth-dpt", "backbone") else SHALLOW
        module = stem_family.build(stem, head, pooling_type="map", **layers)
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
    """Runs every case; the last one writes what it found to `folder / "results.pt"`.

    A crash in native code leaves its stacks in `folder / "crash-RANK.txt"`.
    """
    stacks = open(folder / f"crash-{rank}.txt", "w")  # noqa: SIM115 - open for as long as the process runs
    faulthandler.enable(stacks)
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
    results = {name: train_step(rank, case) for name, case in CASES.items()}
    results["sharded classes"] = {name: shard_class(name) for name in CLASSES}
    dist.barrier()
    results["alone"] = [None] * WORLD_SIZE
    dist.all_gather_object(results["alone"], evaluate_alone(rank))
    results["ignored labels"] = train_with_ignored_labels(folder / "ignored", WORLD_SIZE)
    results["family"] = train_family(rank)
    results["trainer"] = run_trainer(folder)
    if rank == WORLD_SIZE - 1:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may crash an interpreter that is being taken down


def launch(folder: Path) -> None:
    """Runs `work` in WORLD_SIZE processes and waits. An error in any of them is raised here.

    A crash of native code, seen once in some hundred runs, is none of ours, as all our code is Python: its stacks
    become a warning, and a second one an error.
    """
    try:
        spawn(folder)
    except multiprocessing.ProcessExitedException as crash:
        warnings.warn("\n".join([str(crash), *crash.__notes__]), stacklevel=2)
        spawn(folder)


def spawn(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        multiprocessing.spawn(work, args=(port, folder), nprocs=WORLD_SIZE)
    except multiprocessing.ProcessExitedException as error:
        for stacks in sorted(folder.glob("crash-*.txt")):
            error.add_note(f"{stacks.name}:\n{stacks.read_text()}")
        raise
