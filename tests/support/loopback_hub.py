"""A Hub on this machine, for tests that push and pull."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server

TOKEN = "hf_alice"
# Weights go the way of large files, the rest the way of small ones, as on the Hub.
REGULAR_LIMIT = 60_000


@contextlib.contextmanager
def started(root: Path) -> Iterator[dict[str, str]]:
    """Gives the environment in which the Hub is the one on loopback, with `root` for its files; nobody is logged in."""
    command = [sys.executable, hub_server.__file__, "--root", str(root), "--port", "0", "--token", f"{TOKEN}=alice"]
    command += ["--regular-limit", str(REGULAR_LIMIT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready, address = server.stdout.readline().split()
            assert ready == "READY"
            # The server has the plain protocol for large files, not the Hub's newer one.
            yield {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        finally:
            server.terminate()
