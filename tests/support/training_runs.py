"""Runs of the recipes that tests compare: in this process, or in new ones that are killed or share the work."""

import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

REPO = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_num_workers": 0}
# What `accelerate launch` makes of the fsdp_config of `accelerate config`.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# Imported once, by the process that the others are forked from, as they take seconds; none of them is of this project.
PRELOADED = ["datasets", "kornia", "matplotlib.figure", "sklearn.metrics", "torch.distributed.fsdp"]
PRELOADED += ["transformers.trainer", "transformers.models.clip.processing_clip"]


def flags(**options: object) -> list[str]:
    """flags(dataset="x", steps=2, freeze=["a", "b"]) -> --dataset x --steps 2 --freeze a b; no flag for None."""
    given = []
    for name, value in options.items():
        if value is not None:
            given += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return given


def save_blank(figure: Figure, path: Path, **options: object) -> None:
    """In place of `Figure.savefig`, which takes longer than the training of a small model."""
    Image.new("RGB", (1, 1)).save(path, "png")


def run_here(command: ModuleType, sheets: bool = False, **options: object) -> None:
    """Runs a command of examples/ in this process; what it draws is blank without `sheets`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command.__name__, *flags(**{**QUIET, **options})])
        if not sheets:
            patch.setattr(Figure, "savefig", save_blank)
        command.main()


def run_apart(recipe: str, options: dict, *before: Callable[[], None], processes: int = 1, status: int = 0) -> None:
    """Runs a recipe as `python`, or torchrun with several processes, does in the folder above its output.

    Args:
        before: called first, in each process.
        status: what the first process that fails has to end with: -9 after SIGKILL, 0 for none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    output = Path(options["output_dir"])
    arguments = (recipe, flags(**{**QUIET, **options}), output.parent, output.with_suffix(".log"), before)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [context.Process(target=be, args=(*arguments, rank if processes > 1 else {})) for rank in ranks]
    for process in started:
        process.start()
    while alive := [process.sentinel for process in started if process.is_alive()]:
        if not multiprocessing.connection.wait(alive, TIMEOUT) or any(process.exitcode for process in started):
            break
    statuses = [process.exitcode for process in started]
    for process in started:  # one that waits for another that failed, or hangs
        process.kill()
        process.join()
    statuses += [process.exitcode for process in started]
    assert next(filter(None, statuses), 0) == status, output.with_suffix(".log").read_text()[-3000:]


def be(recipe: str, arguments: list[str], cwd: Path, log: Path, before: tuple, variables: dict[str, str]) -> None:
    """Of a new process: what `python examples/RECIPE.py ARGUMENTS` does."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in any process on Linux
    os.chdir(cwd)
    os.environ.update(variables)
    Figure.savefig = save_blank
    for call in before:
        call()
    script = str(REPO / "examples" / f"{recipe.split()[0]}.py")
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def text_fields() -> dict:
    """`text_config` of a small tower that reads the shipped tokenizer."""
    shipped = json.loads((REPO / "config.json").read_text())["text_config"]
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**tiny.TEXT, **{name: shipped[name] for name in names}}


# --- what a run leaves ---


def results(output_dir: Path, split: str) -> dict[str, float]:
    """The metrics of a split without its prefix: results(run, "eval")["loss"]."""
    found = json.loads((output_dir / f"{split}_results.json").read_text())
    return {name.removeprefix(f"{split}_"): value for name, value in found.items()}


def losses(output_dir: Path) -> list[float]:
    """The training loss of every logged step."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model.safetensors")


def assert_equal_runs(folder: Path, other: Path) -> None:
    """Bit for bit: the loss of every step, and the weights."""
    assert losses(folder) == losses(other)
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


# --- for `before` ---


def kill_in_step(number: int) -> None:
    """SIGKILL as a training step begins."""
    from recipes.trainer import RecipeTrainer

    step = RecipeTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == number - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    RecipeTrainer.training_step = killed


def leave_pictures_alone() -> None:
    """The contrastive collator varies the pictures of a process together, so differently in two processes: not here."""
    import recipes.contrastive

    class StillCollator(recipes.contrastive.Collator):
        def vary(self, rgba: torch.Tensor, is_mono: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(rgba[:, :3].float() / 255, self.image_size, mode="area") - 0.5

    recipes.contrastive.Collator = StillCollator


def record_wrapper() -> None:
    """Writes to wrapper.json of the output folder how the model is wrapped in the first step."""
    from recipes.trainer import RecipeTrainer

    step = RecipeTrainer.training_step

    def recorded(self, model, *args, **kwargs):
        if self.state.global_step == 0 and self.is_world_process_zero():
            whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
            found = {"class": type(model).__name__, "is_fsdp": isinstance(model, FSDPModule), "whole": whole}
            (Path(self.args.output_dir) / "wrapper.json").write_text(json.dumps(found))
        return step(self, model, *args, **kwargs)

    RecipeTrainer.training_step = recorded


def fsdp_on_cpus() -> None:
    """FSDP; accelerate, which has it for accelerators only, takes CPUs for such. All else is its and torch's own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    os.environ.update(FSDP)
    init = AcceleratorState.__init__

    def init_as_accelerator(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = init_as_accelerator
