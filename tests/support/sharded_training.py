"""examples/train_contrastive.py under FSDP on CPUs, for `accelerate launch`; see training_runs."""

import runpy
import sys
from pathlib import Path

import training_runs

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_contrastive.py"

if __name__ == "__main__":
    sys.argv[0], sys.path[0] = str(SCRIPT), str(SCRIPT.parent)
    training_runs.shard_on_cpus()
    training_runs.leave_pictures_alone()
    training_runs.record_wrapper()
    runpy.run_path(str(SCRIPT), run_name="__main__")
