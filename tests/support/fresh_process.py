"""Runs a function in a new process.

The first remote class loaded wins for a whole process, so a question about loading from a folder or a Hub needs a
process of its own, with its own HF_HOME.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fork_server import ForkServer

# Nothing listens there: whoever asks the Hub in spite of HF_HUB_OFFLINE gets an error, not an answer.
DEAD_ENDPOINT = "http://127.0.0.1:9"

CHILD = """
import json, os, sys
from pathlib import Path
import torch, transformers
from fresh_process import auto_load, digests, junk_in_new_memory, outputs
{source}
_result = {name}(**json.loads(Path({sent!r}).read_text(encoding="utf-8")))
Path({received!r}).write_text(json.dumps(_result), encoding="utf-8")
"""


def environment_of(**changes: str) -> dict[str, str]:
    """The variables of a new process: offline, unless HF_ENDPOINT is among the changes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHON", "PYTEST_"))}
    support, path = os.path.dirname(__file__), changes.pop("PYTHONPATH", os.environ.get("PYTHONPATH"))
    offline = {} if "HF_ENDPOINT" in changes else {"HF_ENDPOINT": DEAD_ENDPOINT, "HF_HUB_OFFLINE": "1"}
    return {
        **kept,
        **offline,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([support, path] if path else [support]),
        "PYTHONDONTWRITEBYTECODE": "1",
        **changes,
    }


@functools.lru_cache(maxsize=2)
def fork_server(python: str, variables: tuple[tuple[str, str], ...]) -> ForkServer:
    return ForkServer(python, dict(variables))


def run_fresh(
    function: Callable[..., Any],
    home: str | os.PathLike,
    *,
    cwd: str | os.PathLike | None = None,
    python: str = sys.executable,
    environment: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """Calls `function(**arguments)` in a new process, which has imported transformers and nothing of ours.

    Args:
        function: sent as source text. It sees `json`, `os`, `sys`, `Path`, `torch`, `transformers` and the functions of
            this module, imports all else that it uses, and does not see the test file it stands in.
        home: HF_HOME of the process, private to it when fresh.
        cwd: working folder; `home` by default.
        python: interpreter to run.
        environment: variables to set; HF_ENDPOINT among them puts the process online, else it is offline.
        arguments: anything JSON can hold, as can the result.

    Raises:
        AssertionError: the process failed, with what it wrote to stderr.
    """
    variables = environment_of(**(environment or {}))
    os.makedirs(home, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sent, received, file = (os.path.join(folder, name) for name in ("arguments", "result", "code.py"))
        source, name = textwrap.dedent(inspect.getsource(function)), function.__name__
        Path(sent).write_text(json.dumps(arguments), encoding="utf-8")
        Path(file).write_text(CHILD.format(sent=sent, received=received, source=source, name=name), encoding="utf-8")
        server = fork_server(python, tuple(sorted(variables.items())))
        server.run(Path(file), Path(cwd or home), Path(home), seconds=300)
        return json.loads(Path(received).read_text(encoding="utf-8"))


def digests(model) -> dict[str, str]:
    """A hash of every parameter's and buffer's dtype, shape and bits, by name."""
    import torch

    result = {}
    for name, tensor in model.state_dict().items():
        head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        result[name] = hashlib.sha256(head + raw).hexdigest()
    return result


@contextlib.contextmanager
def junk_in_new_memory() -> Iterator[None]:
    """Tensors of uninitialised memory (`torch.empty`) hold NaN: a weight or buffer that nobody fills is caught."""
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def auto_load(auto_class: str, path: str, **options):
    """`transformers.<auto_class>.from_pretrained(path)` with remote code.

    AutoBackbone of transformers 5 asks the Hub for the name first and so takes no folder; from_config has its class.
    """
    import transformers

    options["trust_remote_code"] = True
    if auto_class == "AutoBackbone" and os.path.isdir(path) and transformers.__version__ >= "5":
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
        backbone_class = type(transformers.AutoBackbone.from_config(config, trust_remote_code=True))
        return backbone_class.from_pretrained(path, **options)
    return getattr(transformers, auto_class).from_pretrained(path, **options)


def outputs(model, inputs: dict[str, Any]) -> list:
    """The tensors that the model returns, in its order, for those of these inputs that it takes."""
    import torch

    accepted = inspect.signature(model.forward).parameters
    with torch.no_grad():
        returned = model.eval()(
            **{name: value for name, value in inputs.items() if name in accepted}, return_dict=False
        )
    flat = []
    for value in returned:
        flat.extend(value if isinstance(value, tuple) else [value])
    return flat
