"""Hostile and broken checkpoints, one lie each: refused by a message that says what is wrong, with nothing run.

Truncated files, gadgets and the archives of TorchScript are in test_openai_archives.py.
"""

import argparse
import collections
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import torch

from vit_embed.conversion.layouts.rules import count_non_finite
from vit_embed.conversion.memory import one_by_one
from vit_embed.conversion.reading import files as reading_files
from vit_embed.conversion.reading import read_checkpoint, torch_pickle
from vit_embed.conversion.source import find_source
from vit_embed.convert_checkpoint import main

ENTRY = files.entry()


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


# Safetensors

DATA = bytes(24)
SAFETENSORS = {
    "two tensors over the same bytes": (files.safetensors({"a": ENTRY, "b": ENTRY}, DATA), "invalid offset"),
    "past the end": (files.safetensors({"a": ENTRY}, DATA[:-1]), "file not fully covered"),
    "a header of 2**63 bytes": (files.safetensors({"a": ENTRY}, DATA, 2**63), "header too large"),
    "no JSON": (files.safetensors(b"{no JSON}"), "invalid JSON"),
    "a size that overflows": (files.safetensors({"a": files.entry("F32", [2**40, 2**40], 0, 0)}), "overflow"),
    "an endless side of nothing": (files.safetensors({"a": files.entry("F32", [0, 2**62], 0, 0)}), "it is corrupt"),
    "100 dimensions": (files.safetensors({"a": files.entry("F32", [1] * 100, 0, 4)}, DATA[:4]), "100 dimensions"),
    "numbers of half a byte": (files.safetensors({"a": files.entry("F4", [8], 0, 4)}, DATA[:4]), "float4"),
    "an unknown dtype": (files.safetensors({"a": files.entry("F99", [1], 0, 4)}, DATA[:4]), "unknown variant"),
    "no tensors": (files.safetensors({"__metadata__": {"format": "pt"}}), "must hold a state dict"),
    "a name that writes to a terminal": (files.safetensors({"\x1b[2J": ENTRY}, DATA), r"a word .* got '\\x1b\[2J'"),
    "two lines as a name": (files.safetensors({"a\nb": ENTRY}, DATA), r"got 'a\\nb'"),
    "an endless name": (files.safetensors({"a" * 10**6: ENTRY}, DATA), "at most 500 letters"),
    "half a character": (files.safetensors(b'{"\\ud800":%s}' % json.dumps(ENTRY).encode(), DATA), "invalid JSON"),
    # The library takes the last of them, other readers the first.
    "two tensors of one name": (
        files.safetensors(
            b'{"a":%s,"a":%s}' % tuple(json.dumps(files.entry(dtype)).encode() for dtype in ("F32", "I32")), DATA
        ),
        "has 2 entries named 'a'",
    ),
}


def test_every_dtype_is_read_where_it_lies(tmp_path):
    # Behind one byte, so that nothing is where a number of its length would be put.
    dtypes = {"F64": 8, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "U16": 2, "BOOL": 1, "C64": 8}
    header, end = {"byte": files.entry("U8", [1], 0, 1)}, 1
    for dtype, length in dtypes.items():
        header[dtype] = files.entry(dtype, [2], end, end + 2 * length)
        end += 2 * length
    data = bytes([1] * end)
    got = read_checkpoint(files.written(tmp_path / "a.safetensors", files.safetensors(header, data)))
    assert got.keys() == header.keys() and [got[name].itemsize for name in dtypes] == list(dtypes.values())
    for name, tensor in got.items():
        assert bytes(tensor.clone().view(torch.uint8).tolist()) == data[: tensor.nbytes], name


# Pickles: what a state dict may describe


def calls(name: str, *arguments) -> files.Call:
    return files.Call(files.Name(name), arguments)


PICKLES = {
    "a name of another package": ({"a": calls("os.system", "true")}, "it names os.system, but"),
    "a class of tensors": ({"a": calls("torch._utils._rebuild_wrapper_subclass")}, "it names torch._utils._rebuild_wr"),
    "memory without end": ({"a": calls("builtins.bytearray", 10**12)}, "something else: a"),
    "a tensor of any size": ({"a": calls("torch.FloatTensor", 10**9)}, "it names torch.FloatTensor"),
    "text that doubles": ({"a": calls("_codecs.encode", "a", "hex")}, "something else: a"),
    "something called that is none": ({"a": files.Call(files.tensor(), ())}, "View' object is not callable"),
    "a dtype called": ({"a": calls("torch.float32")}, "cannot be called"),
    "a reference to a module": ({"a": files.Reference(("module", 1, 2, 3, 4))}, "must name a storage"),
    "a part of a storage": ({"a": files.Reference((*files.storage().reference, ("0", 1, 2)))}, "must name a storage"),
    "a storage of no numbers": ({"a": files.storage(kind="collections.OrderedDict")}, "must name a storage"),
    "a tensor of no class": ({"a": calls("torch._tensor._rebuild_from_type_v2", 1, 2, ())}, "torch's own class"),
    "a record's length that is none": ({"a": files.tensor(files.storage(numel=6.0))}, "must name a storage"),
    "more numbers than its record": ({"a": files.tensor(size=(7,))}, "ends at 7, the record data/0 at 6"),
    "more numbers than memory": ({"a": files.tensor(files.storage(numel=2**40), size=(2**40,))}, "cannot be read"),
    "steps that overflow": ({"a": files.tensor(size=(5,), stride=(2**61,))}, "ends at"),
    "sizes and strides of two lengths": ({"a": files.tensor(size=(2, 3))}, "a size and strides"),
    "a size that is a number": ({"a": files.tensor(size=6)}, "a size and strides"),
    "a negative side": ({"a": files.tensor(size=(-6,))}, "from 0 up"),
    "a negative offset": ({"a": files.tensor(offset=-1)}, "from 0 up"),
    "a side that is a float": ({"a": files.tensor(size=(6.0,))}, "from 0 up"),
    "100 dimensions": ({"a": files.tensor(size=(1,) * 100, stride=(1,) * 100)}, "a size and strides"),
    "a conjugated view": ({"a": files.tensor(None, 0, (6,), (1,), {"conj": True})}, "conjugated"),
    "a negated view": ({"a": files.tensor(None, 0, (6,), (1,), {"neg": True})}, "negated"),
    "a sparse tensor": ({"a": calls("torch._utils._rebuild_sparse_tensor")}, "something else: a"),
    "two lengths of one record": (
        {"a": files.tensor(), "b": files.tensor(files.storage(numel=5), size=(5,))},
        "two dtypes or lengths",
    ),
    "two dtypes of one record": (
        {"a": files.tensor(), "b": files.tensor(files.storage(kind="torch.IntStorage"))},
        "two dtypes or lengths",
    ),
    "a storage type of nowhere": ({"a": files.tensor(files.storage(kind="torch.QInt8Storage"))}, "torch.QInt8Storage"),
    "few bytes repeated for ever": ({"a": files.tensor(size=(2**20, 2**20), stride=(0, 0))}, "it is corrupt"),
    "few bytes as many tensors": (
        {str(n): files.tensor(offset=n % 2, size=(1000 + n,), stride=(0,)) for n in range(1000)},
        "it is corrupt",
    ),
    "a key that is a tuple": ({("a", "b"): files.tensor()}, "a key must be text or a number"),
    "a tensor without a name": ({3: files.tensor()}, "something else: 3"),
    "a list of tensors": ([files.tensor()], "must hold a state dict"),
    "a name that writes to a terminal": ({"\x1b[2J": files.tensor()}, "a word"),
    "such a name of no tensor": ({"\x1b[2J": 3}, r"something else: \?\[2J"),
}

# 60 tuples, each twice in the next: to hash or to print the last is to walk through 2**60.
DOUBLED = b")" + b"q\0h\0\x86" * 60
INSTRUCTIONS = {
    "a key that takes for ever to hash": (b"\x80\x02}" + DOUBLED + b"Ns.", "a key must be text or a number"),
    "a reference that takes for ever to print": (b"\x80\x02" + DOUBLED + b"Q.", "cannot be read|corrupt"),
    "a storage that takes for ever to print": (
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n" + DOUBLED + b"NK\x06tQ.",
        "must name a record, got tuple",
    ),
    "an object made by the pickle": (b"\x80\x02(cos\nsystem\n.", "it names os.system"),
    "an object of the old form": (b"\x80\x02(S'true'\nios\nsystem\n.", "instruction"),
    "a registered extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a name put together": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it names os.system"),
    "a state for a function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the state of what has none"),
    "a tensor's state": (b"\x80\x02" + files.instructions(files.tensor()) + b"}b.", "sets the state of what has none"),
    "nothing on the stack": (b"\x80\x02}s.", "its pickle is corrupt"),
    "an object that was not kept": (b"\x80\x02h\x05.", "its pickle is corrupt: Memo value not found at index 5"),
    "a module inside itself": (b"\x80\x02c__torch__\nModel\n)\x81q\0}X\1\0\0\0wh\0sb.", "appears twice"),
    "a module of no tensor": (b"\x80\x02c__torch__\nModel\n)\x81}X\1\0\0\0wNsb.", "must hold a state dict"),
    "no end": (b"\x80\x02}", "cannot be read"),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fa.", "cannot be read"),
    "text longer than memory": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.", "cannot be read"),
}


ONE = files.pickled({"a": files.tensor()})
LEGACY = {
    "fewer numbers than its record": (
        files.legacy(ONE, rows=struct.pack("=q5f", 5, *range(5))),
        "must have 6 numbers, got 5",
    ),
    "a negative length": (
        files.legacy(
            files.pickled({"a": files.tensor(files.storage(numel=-1), size=(0,))}), rows=struct.pack("=q", -1)
        ),
        "ends at",
    ),
    "one record too many": (files.legacy(ONE, keys="01"), "list of records"),
    "a record twice": (files.legacy(ONE, keys="00"), "list of records"),
    "a record that takes for ever to hash": (files.legacy(ONE, b"\x80\x02](" + DOUBLED + b"e."), "list of records"),
    "bytes after the last record": (files.legacy(ONE) + b"x", "1 bytes after"),
    "half of the last record": (files.legacy(ONE)[:-12], "cannot be read"),
    "another order of bytes": (files.legacy(ONE, little=sys.byteorder != "little"), "order of bytes"),
    "another magic": (files.pickled(3) + files.pickled(1001), "no file of safetensors or torch"),
}


# Archives


def with_fields(content: bytes, name: str, header: bytes, **fields: int) -> bytes:
    """An archive with numbers of a record changed: in its entry in the directory, or in the header in front of it."""
    places = {"flags": (4, "H"), "method": (6, "H"), "crc": (12, "I"), "stored": (16, "I"), "length": (20, "I")}
    places = {**places, "name_length": (24, "H"), "extra_length": (26, "H"), "begin": (38, "I")}
    shift = 4 if header == b"PK\1\2" else 2
    end = content.index(name.encode(), content.index(header)) if shift == 2 else content.rindex(name.encode())
    start = content.rindex(header, 0, end)
    changed = bytearray(content)
    for field, value in fields.items():
        offset, kind = places[field]
        struct.pack_into(f"<{kind}", changed, start + offset + shift, value)
    return bytes(changed)


def appended(content: bytes, name: str, data: bytes) -> bytes:
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two records with one name
        archive.writestr(name, data)
    return buffer.getvalue()


WHOLE = files.archive(ONE)
DIRECTORY, LOCAL = b"PK\1\2", b"PK\3\4"
ARCHIVES = {
    "two records of one name": (appended(WHOLE, "archive/data/0", bytes(24)), "two records of the archive"),
    "two pickles of one name": (appended(WHOLE, "archive/data.pkl", ONE), "two records of the archive"),
    "two pickles": (appended(WHOLE, "other/data.pkl", ONE), "one NAME/data.pkl, got 2"),
    "no pickle": (files.archive(ONE, root="a/b"), "one NAME/data.pkl, got 0"),
    "another checksum": (with_fields(WHOLE, "archive/data/0", DIRECTORY, crc=1), "Bad CRC-32 for record data/0"),
    "a record in place of another": (
        with_fields(files.archive(ONE, {"0": bytes(24), "1": bytes(24)}), "archive/data/0", DIRECTORY, begin=0),
        "not where the directory says",
    ),
    "a record behind the end": (with_fields(WHOLE, "archive/data/0", DIRECTORY, begin=10**6), "cannot be read"),
    "a record that is longer": (with_fields(WHOLE, "archive/data/0", DIRECTORY, length=28, stored=28), "must have 24"),
    "a record longer than the file": (with_fields(WHOLE, "archive/data/0", DIRECTORY, length=10**6), "claims 1000"),
    "a longer name where it lies": (with_fields(WHOLE, "archive/data/0", LOCAL, name_length=20), "not where"),
    "data elsewhere": (with_fields(WHOLE, "archive/data/0", LOCAL, extra_length=9), "Bad CRC-32"),
    "data behind the end": (with_fields(WHOLE, "archive/data/0", LOCAL, extra_length=60000), "Bad CRC-32"),
    "a compressed record": (with_fields(WHOLE, "archive/data/0", DIRECTORY, method=8), "stored uncompressed"),
    "a pickle with a password": (with_fields(WHOLE, "archive/data.pkl", DIRECTORY, flags=1), "cannot be read"),
    "another order of bytes": (WHOLE.replace(sys.byteorder.encode(), b"neithr"), "cannot be read"),
    "a record that is not there": (files.archive(ONE, {}), "data/0"),
    "a record outside": (
        files.archive(files.pickled({"a": files.tensor(files.storage("../../a.pt"))})),
        "data/../../a.pt",
    ),
    "a record that is no text": (files.archive(files.pickled({"a": files.tensor(files.storage(7))})), "got data/7"),
    # Found by fuzzing: the locator of a directory of 64 bits, which even `zipfile.is_zipfile` raises for.
    "an archive of many disks": (
        WHOLE[: WHOLE.rindex(b"PK\5\6")] + b"PK\6\7" + bytes([1] * 16) + WHOLE[WHOLE.rindex(b"PK\5\6") :],
        "cannot be read as a checkpoint: zipfiles that span multiple disks",
    ),
    "an archive behind something else": (b"#!/bin/sh\n" + WHOLE, "no file of safetensors or torch"),
}


FOREIGN = {
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "no file of safetensors or torch"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "no file of safetensors or torch"),
    "zeros": (bytes(4096), "no file of safetensors or torch"),
}
FORMS = {"zip": files.archive, "legacy": files.legacy}
PICKLED = {lie: (files.pickled(value), message) for lie, (value, message) in PICKLES.items()} | INSTRUCTIONS
LIES = {**SAFETENSORS, **ARCHIVES, **FOREIGN, **{f"{lie}, old torch": row for lie, row in LEGACY.items()}} | {
    f"{lie}, {form}": (FORMS[form](content), message) for form in FORMS for lie, (content, message) in PICKLED.items()
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_by_one_line_and_nothing_is_written(tmp_path, caplog, capsys, lie):
    content, message = LIES[lie]
    path = files.written(tmp_path / ("a.safetensors" if lie in SAFETENSORS else "a.pt"), content)
    refused(path, message)
    assert main([str(path), "--output_dir", str(tmp_path / "made" / "out")]) == 1
    assert len(caplog.messages) == 1 and len(caplog.messages[0].splitlines()) == 1
    assert caplog.messages[0].startswith(f"nothing was written: {path} cannot be read as a checkpoint: ")
    assert os.listdir(tmp_path) == [path.name] and "Traceback" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_with_too_many_instructions_is_refused(tmp_path, monkeypatch, form):
    path = files.written(tmp_path / "a.pt", FORMS[form](b"\x80\x02" + b"}" * 1000 + b"."))
    monkeypatch.setattr(torch_pickle, "MAX_READS", 900)
    refused(path, "more than 900 parts")


def test_an_archive_of_64_bits_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", ONE)
        with archive.open("archive/data/0", "w", force_zip64=True) as record:
            record.write(struct.pack("=6f", *files.FLOATS))
    assert read_checkpoint(tmp_path / "a.pt")["a"].tolist() == list(files.FLOATS)


# What is saved is what is read


def training_state() -> dict:
    """What training code saves beside the weights."""
    return {
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, names=["a"]),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "best": np.float64(0.5),
        "others": [torch.Size([1]), torch.device("cpu"), torch.float32, b"abc", {1, 2}, 1j, float("nan"), 10**30, None],
        "counts": collections.Counter("aab"),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, protocol, new):
    shared = torch.arange(12.0).reshape(3, 4)
    marked = torch.ones(2)
    marked.note = "an attribute"
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    weights = {
        **module.state_dict(),
        **{"parameter": torch.nn.Parameter(torch.ones(2)), "marked": marked, "scalar": torch.tensor(3)},
        **{"shared": shared, "transposed": shared.t(), "row": shared[1], "every second": shared[:, ::2]},
        **{"half": torch.ones(3).half(), "bfloat16": torch.ones(3).bfloat16(), "flags": torch.tensor([True, False])},
        **{"complex": torch.tensor([1 + 2j]), "nothing": torch.zeros(0, 5)},
    }
    if new:  # old torch has no such numbers
        weights |= {"float8": torch.ones(3).to(torch.float8_e5m2), "uint16": torch.ones(3).to(torch.uint16)}
    state = {"state_dict": collections.OrderedDict((f"module.{name}", each) for name, each in weights.items())}
    path = tmp_path / "a.pt"
    torch.save({**state, **training_state()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    got = read_checkpoint(path)
    assert list(got) == list(weights)
    for name, tensor in weights.items():
        assert type(got[name]) is torch.Tensor and not got[name].requires_grad
        assert got[name].dtype == tensor.dtype and got[name].tolist() == tensor.tolist(), name


def test_names_of_one_tensor_are_no_bomb(tmp_path):
    tied = torch.randn(100, 100)
    torch.save({f"layers.{number}.weight": tied for number in range(12)}, tmp_path / "a.pt")
    got = read_checkpoint(tmp_path / "a.pt")
    assert len(got) == 12 and len({tensor.data_ptr() for tensor in got.values()}) == 1
    assert torch.equal(got["layers.11.weight"], tied)


def test_only_the_weights_of_a_training_checkpoint_are_looked_at(tmp_path):
    """The optimizer's numbers are longer than the weights, and a broken byte in them is none of ours."""
    torch.save({"model": {"a": torch.ones(6)}, "optimizer": {"state": torch.full((600,), 7.0)}}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    seven = struct.pack("=f", 7.0)
    (tmp_path / "a.pt").write_bytes(content.replace(seven, struct.pack("=f", 8.0), 1))
    assert read_checkpoint(tmp_path / "a.pt")["a"].tolist() == [1.0] * 6
    one = content.index(struct.pack("=6f", *[1.0] * 6))
    (tmp_path / "a.pt").write_bytes(content[:one] + seven + content[one + 4 :])
    refused(tmp_path / "a.pt", "Bad CRC-32")


# Made in the test: torch warns of some that they are a beta or deprecated.


# Shards


def folder_of_shards(folder: Path) -> Path:
    """An index and its two shards."""
    folder.mkdir(parents=True)
    for name in "ab":
        files.written(folder / f"{name}.safetensors", files.safetensors({name: ENTRY}, DATA))
    return indexed(folder, {"a": "a.safetensors", "b": "b.safetensors"})


def indexed(folder: Path, weight_map, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


A, B = "a.safetensors", "b.safetensors"
MAPS = {
    "a tensor too many in a shard": ({"b": B, "x": A}, r"says that a.safetensors has 1 tensors, but the file has 1"),
    "a tensor too few": ({"a": A, "b": B, "x": A}, "in one of them alone: 'x'"),
    "one tensor in two shards": ({"a": A, "b": A}, "in one of them alone: 'b'"),
    "a name of two lines": ({"a": A, "b\nx": A}, r"alone: 'b\\nx'"),
    "an absolute path": ({"a": "/dev/zero"}, "a file beside it"),
    "a folder up": ({"a": "../a.safetensors"}, "a file beside it"),
    "a folder up and back": ({"a": "../shards/a.safetensors"}, "a file beside it"),
    "the folder": ({"a": "."}, "a file beside it"),
    "nothing": ({"a": ""}, "a file beside it"),
    "itself": ({"a": "model.safetensors.index.json"}, "a file beside it"),
    "half a character": ({"a": "\ud800"}, "a file beside it"),
    "the end of a name": ({"a": "a.safetensors\0"}, "a file beside it"),
    "a link away": ({"a": "link"}, "a file beside it"),
    "a link in a ring": ({"a": "ring"}, "a file beside it|no such"),
    "a number": ({"a": 3}, "a weight_map of names and files"),
    "a list": (["a.safetensors"], "a weight_map of names and files"),
    "no tensors": ({}, "its weight_map is empty"),
}


@pytest.mark.parametrize("lie", MAPS)
def test_an_index_that_lies_is_refused(tmp_path, lie):
    weight_map, message = MAPS[lie]
    folder = folder_of_shards(tmp_path / "shards").parent
    files.written(tmp_path / "a.safetensors", (folder / A).read_bytes())
    (folder / "link").symlink_to(tmp_path / "a.safetensors")
    (folder / "ring").symlink_to("ring")
    index = indexed(folder, weight_map)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_checkpoint(index)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"[]", b"", b"{", b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"9" * 10**4])
def test_what_is_no_index_is_refused(tmp_path, content):
    refused(files.written(tmp_path / "x.index.json", content), "cannot be read as JSON|must hold a JSON object")


def test_an_index_of_any_length_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_files, "MAX_JSON_BYTES", 50)
    refused(folder_of_shards(tmp_path / "shards"), "a JSON file has at most 50")


def test_a_missing_or_truncated_shard_is_named(tmp_path):
    index = folder_of_shards(tmp_path / "shards")
    shard = index.parent / B
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="b.safetensors cannot be read"):
        read_checkpoint(index)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        read_checkpoint(index)


def test_shards_of_pickles_are_read(tmp_path):
    for name in "ab":
        torch.save({name: torch.ones(3)}, tmp_path / f"pytorch_model-{name}.bin")
    index = indexed(tmp_path, {name: f"pytorch_model-{name}.bin" for name in "ab"}, "pytorch_model.bin.index.json")
    assert read_checkpoint(index).keys() == {"a", "b"}


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path):
    folder = folder_of_shards(tmp_path / "models--a--b" / "snapshots" / "0123").parent
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "models--a--b" / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert read_checkpoint(folder / "model.safetensors.index.json").keys() == {"a", "b"}
    # The blobs of another repository are not its own.
    shutil.copytree(tmp_path / "models--a--b", tmp_path / "models--c--d", symlinks=True)
    other = tmp_path / "models--c--d" / "snapshots" / "0123" / A
    other.unlink()
    other.symlink_to("../../../models--a--b/blobs/0")
    refused(other.with_name("model.safetensors.index.json"), "a link away")


# What is no file, and what there is too much of


@pytest.mark.parametrize("name", ["pipe", "pipe.index.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "a pipe or a device")


def test_an_empty_file_a_device_a_folder_and_a_ring_of_links_are_refused(tmp_path):
    refused(files.written(tmp_path / "empty.pt", b""), "is empty")
    refused(Path("/dev/zero"), "a pipe or a device")
    (tmp_path / "a.index.json").mkdir()
    refused(tmp_path / "a.index.json", "a folder")
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(FileNotFoundError, match="ring"):
        read_checkpoint(tmp_path / "ring")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = files.written(tmp_path / "a.pt", WHOLE)
    path.chmod(0)
    with pytest.raises(PermissionError, match="a.pt"):
        read_checkpoint(path)


READ_ALL = """
import resource, sys
from vit_embed.conversion.reading import read_checkpoint
import safetensors.torch, torch
base = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (base + int(sys.argv[1]), base + int(sys.argv[1])))
for path in sys.argv[2:]:
    try:
        read_checkpoint(path)
    except ValueError as error:
        assert not isinstance(error.__cause__, MemoryError), error
    else:
        raise AssertionError(path)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_bomb_takes_no_more_memory_than_its_file(tmp_path):
    """With 64 MB more than the modules take, what claims gigabytes is refused, and not for want of memory."""
    bombs = {
        "bytearray.pt": files.archive(files.pickled(PICKLES["memory without end"][0])),
        "tensor.pt": files.archive(files.pickled({"a": calls("torch.FloatTensor", 10**10)})),
        "storage.pt": files.legacy(files.pickled(PICKLES["more numbers than memory"][0])),
        "text.pt": files.legacy(INSTRUCTIONS["text longer than memory"][0]),
        "memo.pt": files.legacy(b"\x80\x02Nr\xff\xff\xff\x7f."),
        "steps.pt": files.archive(files.pickled(PICKLES["few bytes as many tensors"][0])),
        "header.safetensors": files.safetensors({"a": ENTRY}, DATA, 2**40),
        "length.safetensors": files.safetensors({"a": files.entry("F32", [2**32], 0, 2**34)}, DATA),
    }
    paths = [files.written(tmp_path / name, content) for name, content in bombs.items()]
    subprocess.run([sys.executable, "-c", READ_ALL, str(2**26), *paths], check=True, timeout=300)


# Letting go of memory


@pytest.mark.parametrize("memory", ["mapped", "copied", "anonymous", "shared", "read twice"])
def test_release_changes_no_number(tmp_path, memory):
    tensor = torch.randn(1000, 1000)
    if memory in ("mapped", "copied", "read twice"):
        torch.save({"a": tensor}, tmp_path / "a.pt", _use_new_zipfile_serialization=memory != "copied")
        read = read_checkpoint(tmp_path / "a.pt")["a"]
    else:
        read = tensor.clone()
    if memory == "shared":
        read.share_memory_()
    if memory != "read twice":
        read[::7] = tensor[::7] = 3.0  # what is written is in memory alone
    for part in (read, read[1:], read[5, 5:], read.t(), read[:0], read[::2]):
        assert [name for name, _ in one_by_one({"part": part})] == ["part"]
        assert torch.equal(read, tensor)


# Found by fuzzing


def test_a_model_type_that_is_no_text_is_refused(tmp_path):
    """Found by fuzzing the command line: layouts look it up in tables."""
    files.written(tmp_path / "model.safetensors", files.valid_files()["a.safetensors"])
    files.written(tmp_path / "config.json", b'{"model_type": [null]}')
    with pytest.raises(ValueError, match="model_type beside .* must be text, got list"):
        find_source(tmp_path)


def test_numbers_of_one_byte_are_counted():
    """Found by fuzzing the command line: torch has no extremes of float8."""
    assert count_non_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)) == 1
