"""Runs commands of this repository as `python SCRIPT ...` and `torchrun` do, each in processes of its own, in a tenth
of the time: these are forked from one that has imported torch, transformers and the like, and nothing of the commands.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds


class Commands:
    """The process that the commands are forked from, started with the first of them.

    Args:
        environment: variables to set in it, before anything is imported.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.environment, self.server = {**os.environ, **(environment or {})}, None

    def __call__(
        self, script: str, *arguments: object, cwd: Path, before: str = "", processes: int = 1
    ) -> subprocess.CompletedProcess:
        """Runs `script`, a path in this repository, to its end.

        Args:
            before: Python text that is run first, in the same process; it may import the modules of this folder.
            processes: how many run it together, with the variables that torchrun sets.

        Returns:
            returncode (the first that is not 0; negative for a signal, as of subprocess), stdout and stderr of all.
        """
        if self.server is None:
            options = {"env": self.environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.server = subprocess.Popen([sys.executable, __file__], **options, start_new_session=True)
        with tempfile.TemporaryDirectory() as folder:
            job = {"script": str(REPO / script), "arguments": list(map(str, arguments)), "cwd": str(cwd)}
            job |= {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
            self.server.stdin.write(json.dumps({**job, "before": before, "processes": processes}) + "\n")
            self.server.stdin.flush()
            if not select.select([self.server.stdout], [], [], TIMEOUT)[0]:
                written = Path(job["stderr"]).read_text(errors="replace")
                self.close()
                raise TimeoutError(f"{script} took more than {TIMEOUT} s; it wrote: {written[-3000:]}")
            code = int(self.server.stdout.readline())
            texts = [Path(job[name]).read_text(errors="replace") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([script, *job["arguments"]], code, *texts)

    def close(self) -> None:
        """Ends the process and all that it has started."""
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)  # it leads a session of its own
            self.server.wait()
            self.server = None


def run(job: dict) -> int:
    """Of a forked process: what `python SCRIPT ARGUMENTS` does; returns the exit status."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["cwd"])
    sys.path.append(sys.path[0])
    sys.argv, sys.path[0] = [job["script"], *job["arguments"]], os.path.dirname(job["script"])
    try:
        exec(job["before"], {"__name__": "before"})
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(job: dict, variables: dict[str, str]) -> int:
    """Starts a process for a job; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.environ.update(variables)
        code = run(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def start(job: dict) -> list[int]:
    """Starts the processes of a job; returns their numbers."""
    count = job["processes"]
    if count == 1:
        return [fork(job, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [fork(job, {**address, **sizes, **rank}) for rank in ranks]


def serve() -> None:
    """Runs the jobs that come in, one after the other, and writes the exit status of each."""
    import datasets  # noqa: F401
    import kornia  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    from transformers import CLIPProcessor, Trainer  # noqa: F401

    import vit_embed  # noqa: F401

    for line in sys.stdin:
        running, status = set(start(json.loads(line))), 0
        while running:
            child, ended = os.wait()
            running.discard(child)
            code = os.waitstatus_to_exitcode(ended)
            if code and not status:  # the others would wait for it
                status = code
                for other in running:
                    os.kill(other, signal.SIGKILL)
        print(status, flush=True)


if __name__ == "__main__":
    serve()
