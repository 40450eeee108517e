"""Readers of unknown files under random damage and random lies: they return what is there, or refuse.

The examples are the same on every run. VIT_EMBED_FUZZ=50 takes 50 times as many and new ones; what it finds becomes a
small test of its own in test_checkpoint_reader.py.
"""

import json
import math
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vit_embed.conversion.reading import read_checkpoint

LONGER = int(os.environ.get("VIT_EMBED_FUZZ", "0"))
# The slowest file of these sizes that is refused takes milliseconds; a busy machine takes a second.
SECONDS = 20


def fuzz(examples: int) -> Callable:
    return settings(
        max_examples=examples * max(1, LONGER),
        derandomize=not LONGER,
        deadline=None,  # `refusal` has its own, which can stop what hangs
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Hangs(BaseException):
    """No error of a file: nothing that reads may catch it."""


@contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hangs(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(read: Callable, *arguments: Any) -> Any:
    """What reading gives, or None where it is refused as it must be: by a line that names the file."""
    with in_time():
        try:
            return read(*arguments)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert type(error) in (ValueError, FileNotFoundError) or type(error).__name__ == "_Unfit", repr(error)
            assert len(message) < 3000 and "weights_only" not in message
            return None


def sane(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    """Every number can be looked at, and there are no more than the file has."""
    distinct = {}
    for name, tensor in state_dict.items():
        assert isinstance(name, str) and type(tensor) is torch.Tensor and tensor.dim() <= 64
        assert tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad
        distinct[tensor.data_ptr(), tensor.shape, tensor.stride()] = tensor.numel() * tensor.element_size()
    assert sum(distinct.values()) <= path.stat().st_size
    for tensor in state_dict.values():
        tensor.clone()


def read_and_check(path: Path) -> dict[str, torch.Tensor] | None:
    got = attempt(read_checkpoint, path)
    if got is not None:
        sane(got, path)
    return got


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def valid() -> dict[str, bytes]:
    return files.valid_files()


# Damage: bytes changed, lost, inserted, moved

NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([struct.pack("<Q", number) for number in NUMBERS]),
    st.sampled_from([struct.pack("<I", number % 2**32) for number in NUMBERS]),
    st.sampled_from([b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x80\x02", b"R", b"b", b"Q", b"{", b"\0" * 64]),
)
PLACE = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("overwrite"), PLACE, BYTES),
        st.tuples(st.just("insert"), PLACE, BYTES),
        st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
        st.tuples(st.just("cut"), PLACE, st.integers(1, 100)),
        st.tuples(st.just("copy"), PLACE, PLACE),
        st.tuples(st.just("end"), PLACE, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, edits: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, what in edits:
        at = int(place * len(content))
        if kind == "overwrite":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + what :]
        elif kind == "copy":
            start = int(what * len(content))
            content = content[:at] + content[start : start + 64] + content[at + 64 :]
        elif kind == "end":
            content = content[:at]
    return content


def test_whole_files_give_their_tensors(folder, valid):
    for name, content in valid.items():
        assert equal(read_checkpoint(files.written(folder / name, content)), files.small_state_dict()), name


@pytest.mark.parametrize("name", ["a.safetensors", "zip.pt", "legacy.pt", "script.pt"])
@given(edits=EDITS)
@fuzz(150)
def test_a_damaged_file_is_refused_or_sane(folder, valid, name, edits):
    path = files.written(folder / name, damaged(valid[name], edits))
    got = read_and_check(path)
    # An archive has checksums: what it still gives is what was saved.
    assert got is None or name in ("a.safetensors", "legacy.pt") or equal(got, files.small_state_dict())


# Lies: files that are whole, and say what is not so

WILD = st.one_of(st.integers(-2, 12), st.sampled_from([*NUMBERS, 2**64, 10**30, -(2**63)]))
JSON_ATOMS = st.one_of(st.none(), st.booleans(), WILD, st.floats(), st.text(max_size=5), st.just("storage"))
ATOMS = st.one_of(JSON_ATOMS, st.binary(max_size=3))
NAMES = [
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter"),
    *("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter_with_state", "torch.Tensor"),
    *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage", "torch.Size"),
    *("torch.nn.parameter.Parameter", "torch.FloatStorage", "torch.storage.UntypedStorage", "torch.float32"),
    *("collections.OrderedDict", "collections.Counter", "argparse.Namespace", "builtins.bytearray", "_codecs.encode"),
    *("torch.jit._pickle.build_intlist", "__torch__.Model", "__torch__.torch.nn.Module", "os.mkdir", "builtins.exec"),
]
VALUES = st.recursive(
    st.one_of(ATOMS, st.sampled_from(NAMES).map(files.Name), st.just(files.tensor()), st.just(files.storage())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=8).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.sampled_from(["state_dict", "model"])), inner, max_size=4),
        st.builds(files.Call, inner, st.lists(inner, max_size=8).map(tuple)),
        st.builds(files.Call, st.sampled_from(NAMES).map(files.Name), st.lists(inner, max_size=8).map(tuple)),
        st.builds(files.Reference, inner),
    ),
    max_leaves=20,
)
FORMS = st.sampled_from([files.archive, files.legacy])


@given(value=VALUES, form=FORMS)
@fuzz(200)
def test_a_pickle_of_anything_is_refused_or_sane(folder, value, form):
    try:
        content = files.pickled(value)
    except (UnicodeEncodeError, OverflowError):  # half a character; a text that pickle cannot hold
        return
    read_and_check(files.written(folder / "any.pt", form(content)))


SIDES = st.lists(st.one_of(st.integers(0, 4), WILD), max_size=4).map(tuple)


@given(
    numel=st.one_of(st.just(6), WILD),
    offset=st.one_of(st.integers(0, 6), WILD),
    shape=st.one_of(st.tuples(SIDES, SIDES), SIDES.map(lambda size: (size, tuple(1 for _ in size)))),
    kind=st.sampled_from(["torch.FloatStorage", "torch.HalfStorage", "torch.storage.UntypedStorage"]),
    form=FORMS,
)
@example(numel=6, offset=0, shape=((), ()), kind="torch.HalfStorage", form=files.legacy)  # half of the file is left
@fuzz(300)
def test_a_tensor_is_the_part_of_its_record_that_it_says(folder, numel, offset, shape, kind, form):
    size, stride = shape
    value = {"a": files.tensor(files.storage(numel=numel, kind=kind), offset, size, stride)}
    got = read_and_check(files.written(folder / "part.pt", form(files.pickled(value))))
    if got is not None:
        assert numel * got["a"].itemsize == 24 and got["a"].shape == size
        if kind != "torch.FloatStorage" or not got["a"].numel():  # sides of 2**31 beside one of 0
            return
        places = [offset]
        for count, step in zip(size, stride):
            places = [place + step * index for place in places for index in range(count)]
        assert got["a"].flatten().tolist() == [files.FLOATS[place] for place in places]


ENTRIES = st.one_of(
    st.builds(
        files.entry,
        st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "F99", "U8"]),
        st.lists(st.one_of(st.integers(0, 6), WILD), max_size=3),
        st.one_of(st.integers(0, 24), WILD),
        st.one_of(st.integers(0, 24), WILD),
    ),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), JSON_ATOMS),
)


@given(
    pairs=st.lists(st.tuples(st.text(max_size=3), ENTRIES), max_size=3),
    data=st.sampled_from([bytes(range(24)), bytes(range(6)), b""]),
    length=st.one_of(st.none(), st.sampled_from(NUMBERS)),
)
@fuzz(300)
def test_a_header_of_anything_is_refused_or_true(folder, pairs, data, length):
    header = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(each)}" for name, each in pairs) + "}"
    got = read_and_check(files.written(folder / "header.safetensors", files.safetensors(header.encode(), data, length)))
    if got is not None:
        assert length is None and got.keys() == dict(pairs).keys() and len(pairs) == len(got)
        for name, each in pairs:
            begin, end = each["data_offsets"]
            assert (
                list(got[name].shape) == each["shape"] and math.prod(each["shape"]) * got[name].itemsize == end - begin
            )
            assert bytes(got[name].flatten().view(torch.uint8).tolist()) == data[begin:end]


SHARDS = ["a.safetensors", "b.safetensors", "../outside.safetensors", "link.safetensors", "ring", "", ".", "..", "a\0"]


@pytest.fixture(scope="module")
def shards(folder) -> Path:
    """A folder with two shards, one shard beside it, a link to that, and a link in a ring."""
    (folder / "shards").mkdir()
    for path, key in (("shards/a", "a"), ("shards/b", "b"), ("outside", "c")):
        files.written(folder / f"{path}.safetensors", files.safetensors({key: files.entry()}, bytes(24)))
    (folder / "shards" / "link.safetensors").symlink_to("../outside.safetensors")
    (folder / "shards" / "ring").symlink_to("ring")
    return folder / "shards"


@given(
    weight_map=st.one_of(
        st.dictionaries(st.sampled_from("abcd"), st.one_of(st.sampled_from(SHARDS), st.text(), JSON_ATOMS), max_size=4),
        st.just({"a": "a.safetensors", "b": "b.safetensors"}),
        JSON_ATOMS,
    ),
    edits=st.one_of(st.just([]), EDITS),
)
@fuzz(200)
def test_an_index_of_anything_gives_only_the_files_beside_it(shards, weight_map, edits):
    index = shards / "model.safetensors.index.json"
    index.write_bytes(damaged(json.dumps({"metadata": {}, "weight_map": weight_map}).encode(), edits))
    got = attempt(read_checkpoint, index)
    assert got is None or (got and got.keys() <= {"a", "b"})
    if weight_map == {"a": "a.safetensors", "b": "b.safetensors"} and not edits:
        assert got.keys() == {"a", "b"}
