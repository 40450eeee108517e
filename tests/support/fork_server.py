"""Runs Python files in forks of a process that has imported torch and transformers already: new processes cost little.

`ForkServer` is the side of the tests. As a script this reads a line of JSON for each file, {"file", "folder", "home",
"seconds"}, and answers with {"status"}.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path

# What most of the files import, and nothing of ours.
LIBRARIES = (
    *("torch", "numpy", "PIL.Image", "transformers:AutoModel", "transformers:AutoProcessor", "transformers:pipeline"),
    *("transformers:CLIPTokenizer", "transformers:CLIPImageProcessor"),
)


def close(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait(timeout=30)


class ForkServer:
    """Started with these variables. `libraries` are imported before the first fork, "package:name" for one that the
    package imports when the name is used."""

    def __init__(self, python: str, variables: dict[str, str], libraries: tuple[str, ...] = LIBRARIES):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([python, __file__, *libraries], env=variables, **pipes)
        weakref.finalize(self, close, self.process)
        assert self.answer() == "ready"

    def answer(self) -> int | str:
        return json.loads(self.process.stdout.readline())["status"]

    def run(self, file: Path, folder: Path, home: Path, seconds: float) -> str:
        """What it prints, run in `folder` with HF_HOME=`home`.

        Raises:
            AssertionError: it failed, with the end of what it wrote to stderr.
        """
        request = {"file": str(file), "folder": str(folder), "home": str(home), "seconds": seconds}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = self.answer()
        assert status == 0, f"exit status {status}\n{Path(f'{file}.err').read_text()[-6000:]}"
        return Path(f"{file}.out").read_text()


def run(file: str, folder: str) -> None:
    """As `cd folder && python file < /dev/null > file.out 2> file.err`."""
    os.chdir(folder)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, f"{file}.out", None), (2, f"{file}.err", None)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT if flags is None else flags, 0o644), number)
    sys.argv, sys.path[0] = [file], os.path.dirname(file)
    with open(file, encoding="utf-8") as source:
        code = compile(source.read(), file, "exec")
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(child: int, seconds: float) -> int:
    """The exit status of a child process, which is killed after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


def serve(libraries: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # transformers reads HF_HOME when it is imported: a link, which leads to the home of the file that runs.
        link = os.environ["HF_HOME"] = os.path.join(folder, "home")
        os.mkdir(os.path.join(folder, "empty"))
        os.symlink(os.path.join(folder, "empty"), link)
        for library in libraries:
            package, _, name = library.partition(":")
            module = importlib.import_module(package)
            if name:
                getattr(module, name)
        importlib.import_module("torch").set_num_threads(1)  # a fork has none of the threads of a pool
        print(json.dumps({"status": "ready"}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            os.remove(link)
            os.symlink(os.path.abspath(request["home"]), link)
            child = os.fork()
            if child == 0:
                run(request["file"], request["folder"])
            print(json.dumps({"status": wait(child, request["seconds"])}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
