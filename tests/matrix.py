"""Runs the model's tests on each version of transformers and torch that we name; `make test-matrix`.

    python tests/matrix.py                  # all, about ten minutes each
    python tests/matrix.py --only 5.0.0     # those whose name has this in it

Each has an environment of its own in `.venv-matrix/`, made once. Ends with the table of docs/how-tested.md; fails if
any of them did.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENTS = REPO / ".venv-matrix"
# Each with the huggingface_hub that it asks for.
COMBINATIONS = (
    ("transformers==4.56.2", "huggingface_hub==0.36.2", "torch==2.13.0"),
    ("transformers==4.57.6", "huggingface_hub==0.36.2", "torch==2.13.0"),
    ("transformers==5.0.0", "huggingface_hub==1.33.0", "torch==2.13.0"),
    ("transformers==5.23.0", "huggingface_hub==2.4.0", "torch==2.13.0"),
    ("transformers==5.23.0", "huggingface_hub==2.4.0", "torch==2.6.0"),
)
REQUIREMENTS = "requirements-4.57.txt"
TESTS = [
    *(f"tests/model/test_{name}.py" for name in ("models", "clip_equality", "configuration", "heads", "forward_rules")),
    *(f"tests/model/test_{name}.py" for name in ("dense_models", "text_pooling", "embeddings", "training")),
    *(f"tests/hub/test_{name}.py" for name in ("loading", "text_tower", "pipelines", "saving")),
]


class Result(NamedTuple):
    """Of one combination: what was installed, and pytest's last line."""

    packages: tuple[str, ...]
    status: int
    summary: str


def python_of(packages: tuple[str, ...]) -> Path:
    """The interpreter of the environment with these packages, made where there is none."""
    folder = ENVIRONMENTS / "-".join(package.replace("==", "") for package in packages)
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing {', '.join(packages)} into {folder.relative_to(REPO)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        others = [
            # datasets follows huggingface_hub.
            line.partition("==")[0] if line.startswith("datasets") else line
            for line in (REPO / REQUIREMENTS).read_text().splitlines()
            if line and not line.startswith(("#", "torch", "transformers", "huggingface_hub"))
        ]
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages, *others], check=True)
        subprocess.run([*pip, "--no-deps", "-r", str(REPO / "requirements-references.txt")], check=True)
        subprocess.run([*pip, "--no-deps", "--editable", str(REPO)], check=True)
        ready.touch()
    return python


def run(packages: tuple[str, ...]) -> Result:
    print(f"== {', '.join(packages)}", flush=True)
    command = [python_of(packages), "-m", "pytest", "-n", "2", "--dist", "loadfile", "-q", "-m", "not heavy", *TESTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    last = re.sub(r" in [\d.]+s.*", "", process.stdout.strip().splitlines()[-1].strip("= ")) if process.stdout else ""
    if process.returncode:
        print(process.stdout[-6000:], process.stderr[-2000:])
    print(last, flush=True)
    return Result(packages, process.returncode, last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the combinations with this in a package's name and version")
    options = parser.parse_args()
    chosen = [each for each in COMBINATIONS if any(options.only in package for package in each)]
    if not chosen:
        parser.error(f"--only must be part of one of {sorted({p for each in COMBINATIONS for p in each})}")
    results = [run(packages) for packages in chosen]
    print("\n| transformers | huggingface_hub | torch | result |\n|---|---|---|---|")
    for result in results:
        print(f"| {' | '.join(package.partition('==')[2] for package in result.packages)} | {result.summary} |")
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
