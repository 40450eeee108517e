"""Runs Python files, each in a process of its own: a fork of this one, which has imported torch, transformers and
vit_embed already. Importing them takes seconds, and the pages have dozens of blocks.

Reads a line of JSON for each file, {"file", "folder", "log", "seconds"}, and answers with {"status"}.
"""

import json
import os
import sys
import time

import torch
import transformers

import vit_embed  # noqa: F401

# Imported at first use, and by most blocks.
transformers.AutoModel, transformers.AutoProcessor, transformers.Trainer, transformers.pipeline  # noqa: B018


def run(file: str, folder: str, log: str) -> None:
    """As `cd folder && python file > log 2> log.err`."""
    os.chdir(folder)
    for name, number in ((log, 1), (log + ".err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = [file]
    with open(file, encoding="utf-8") as source:
        code = compile(source.read(), file, "exec")
    names = {"__name__": "__main__"}
    status = 0
    try:
        exec(code, names)
    except BaseException:
        import traceback

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


def main() -> None:
    torch.set_num_threads(1)  # a fork has none of the threads of a pool
    print(json.dumps({"status": "ready"}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request["file"], request["folder"], request["log"])
        print(json.dumps({"status": wait(child, request["seconds"])}), flush=True)


if __name__ == "__main__":
    main()
