"""Runs of the training scripts that tests compare: killed in the middle, or shared among two processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"

KILL = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import recipe, {script} as script

step = recipe.RecipeTrainer.training_step
def killed(self, *args, **kwargs):
    if self.state.global_step == {killed_in} - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

recipe.RecipeTrainer.training_step = killed
for command in {commands!r}:
    if os.fork() == 0:  # saves importing everything again
        sys.argv = command
        script.main()
        os._exit(0)
    print("ended with", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

# The keys of `accelerate config` for two processes on a CPU.
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


def killed_runs(script: str, commands: list[list], killed_in: int) -> None:
    """Runs `script.main()` with each command in a process of its own that gets SIGKILL as step `killed_in` begins."""
    commands = [["x", *map(str, command)] for command in commands]
    code = KILL.format(examples=str(EXAMPLES), script=script, killed_in=killed_in, commands=commands)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout.count("ended with -9") == len(commands), ran.stderr[-3000:]


def start_two_processes(script: str, kind: str, command: list, folder: Path) -> subprocess.Popen:
    """Starts a script by `accelerate launch` in two processes that share each batch, as "ddp" or as "fsdp"."""
    (folder / "fsdp.yaml").write_text(textwrap.dedent(FSDP))
    launchers = {
        "ddp": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        "fsdp": ["--config_file", str(folder / "fsdp.yaml")],
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launchers[kind], "--main_process_port", "0"]
    return subprocess.Popen(
        [*launch, str(EXAMPLES / f"{script}.py"), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for a started script; what it told is the message if it failed."""
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told[-3000:]


def losses(output_dir: Path) -> list[float]:
    """The training loss of every logged step."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
