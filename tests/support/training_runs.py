"""Runs of the recipes that tests compare: in this process, killed in the middle, or shared among two processes.

What is named in `before` of a command (`commands.Commands`) is called there, in the process that trains.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from commands import Commands
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
# The keys of `accelerate config` for FSDP.
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_offload_params: false
  fsdp_cpu_ram_efficient_loading: false
"""


def flags(**options: object) -> list[str]:
    """flags(dataset="x", steps=2, freeze=["a", "b"]) -> --dataset x --steps 2 --freeze a b; no flag for None."""
    given = []
    for name, value in options.items():
        if value is not None:
            given += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return given


def run_here(command: ModuleType, **options: object) -> None:
    """Runs a command of examples/ in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command.__name__, *flags(**{**QUIET, **options})])
        command.main()


def shared_by_two(command: Commands, script: str, options: dict, output_dir: Path, *, sharded: bool = False) -> None:
    """Runs a recipe in two processes, two rows each a step, under DistributedDataParallel or FSDP."""
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "save_strategy": "no"}
    given = flags(**{**options, **sizes, "output_dir": output_dir, "use_cpu": True, "report_to": "none"})
    before = "import training_runs as runs; runs.record_wrapper()" + "; runs.fsdp_on_cpus()" * sharded
    ran = command(script, *given, cwd=output_dir.parent, before=before, processes=2)
    assert ran.returncode == 0, ran.stderr[-3000:]


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


# --- for `before` of a command ---


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
    """What `accelerate launch` with FSDP sets in the environment, and `shard_on_cpus`."""
    settings = yaml.safe_load(FSDP)["fsdp_config"]
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    os.environ.update({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"})
    shard_on_cpus()


def shard_on_cpus() -> None:
    """accelerate turns FSDP on for accelerators only: here it takes CPUs for such. All else is its and torch's own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_as_accelerator(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = init_as_accelerator
