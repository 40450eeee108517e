"""Files of torch: read as data, with nothing in them run; refused where they lie, are cut or are something else."""

import io
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import pytest
import torch
import torch._utils
from conversions import leftovers

from vit_embed.conversion.reading import read_checkpoint
from vit_embed.convert_checkpoint import convert_checkpoint

convert = convert_checkpoint


# Archives: read as data


def rewritten(archive: Path, target: Path, change) -> Path:
    """A copy of a zip archive with `change(name without root, content)` as each record's content; None drops it."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_the_archive_reads_as_torch_reads_it(source):
    state_dict = read_checkpoint(source.archive)
    expected = torch.jit.load(source.archive).state_dict()  # our own archive: its code may run
    assert state_dict.keys() == expected.keys() == source.state_dict.keys()
    for name, tensor in expected.items():
        assert state_dict[name].dtype == tensor.dtype and torch.equal(state_dict[name], tensor)


def test_a_scripted_module_reads_as_torch_reads_it(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 6))
    module.doubles, module.flags = [1.0, 2.0], [True]
    torch.jit.script(module.double()).save(str(tmp_path / "module.pt"))
    state_dict = read_checkpoint(tmp_path / "module.pt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(state_dict[name], tensor)


def test_code_in_an_archive_is_never_run_nor_read(source, converted, tmp_path):
    def break_code(name: str, content: bytes) -> bytes:
        return b"this is not code (" if name.endswith((".py", ".debug_pkl")) else content

    hostile = rewritten(source.archive, tmp_path / "hostile.pt", break_code)
    with pytest.raises(RuntimeError):
        torch.jit.load(hostile)
    convert(hostile, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


class Gadget:
    """Its pickle creates a file when loaded by `pickle.load`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def gadget_files(source, folder: Path, marker: Path) -> dict[str, Path]:
    gadget = Gadget(marker)
    pickled = pickle.dumps(gadget, protocol=2)
    (folder / "pickle.pt").write_bytes(pickled)
    torch.save({**source.state_dict, "extra": gadget}, folder / "zip.pt")
    torch.save({**source.state_dict, "extra": gadget}, folder / "legacy.pt", _use_new_zipfile_serialization=False)

    def with_data(content: bytes):
        return lambda name, old: content if name == "data.pkl" else old

    rewritten(source.archive, folder / "script.pt", with_data(pickled))
    # In place of a module's state, and by the name of a class of the archive's own code.
    module = b"\x80\x02c__torch__.Model\nModel\n)\x81" + pickled[2:-1] + b"b."
    rewritten(source.archive, folder / "state.pt", with_data(module))
    dotted = b"\x80\x04\x8c\x08builtins\x8c\x0aeval.__call\x93."
    rewritten(source.archive, folder / "dotted.pt", with_data(dotted))
    rewritten(source.file, folder / "zip_as_script.pt", with_data(pickled))
    with zipfile.ZipFile(folder / "zip_as_script.pt", "a") as archive:
        archive.writestr("archive/constants.pkl", pickled)
    return {path.stem: path for path in folder.glob("*.pt")}


def test_a_pickle_that_would_run_code_is_refused_and_not_run(source, tmp_path):
    (tmp_path / "files").mkdir()
    marker = tmp_path / "marker"
    files = gadget_files(source, tmp_path / "files", marker)
    pickle.loads((tmp_path / "files" / "pickle.pt").read_bytes())
    assert marker.exists(), "the gadget must work where it is let"
    marker.unlink()
    for path in files.values():
        with pytest.raises(
            ValueError, match="it names (__builtin__|builtins).e(xec|val)|cannot be read as a checkpoint"
        ):
            convert(path, tmp_path / "out")
        assert leftovers(tmp_path) == ["files"]


def test_pickles_besides_the_weights_are_not_read(source, tmp_path):
    marker = tmp_path / "marker"
    pickled = pickle.dumps(Gadget(marker), protocol=2)
    others = ("constants.pkl", "traced_inputs.pkl")
    path = rewritten(source.archive, tmp_path / "a.pt", lambda name, old: pickled if name in others else old)
    assert read_checkpoint(path).keys() == source.state_dict.keys()
    assert not marker.exists()


# Archives that lie. A pickle of the same form as torch's, with any numbers in it:


class Storage:
    def __init__(self, key: str, numel: int, storage_type: type = torch.FloatStorage):
        self.pid = ("storage", storage_type, key, "cuda:0", numel)  # where OpenAI's archives were saved from


class Tensor:
    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        self.arguments = (storage, offset, size, stride, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def script_archive(path: Path, attributes: dict, records: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    """A TorchScript archive of one module with these attributes over these records."""
    module_class = type("Model", (), {"__module__": "__torch__"})
    module = module_class()
    vars(module).update({name: module if value == "itself" else value for name, value in attributes.items()})
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    pickler.persistent_id = lambda value: value.pid if isinstance(value, Storage) else None
    sys.modules["__torch__"] = types.SimpleNamespace(Model=module_class)
    try:
        pickler.dump(module)
    finally:
        del sys.modules["__torch__"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", buffer.getvalue())
        archive.writestr("model/constants.pkl", b"")
        for key, content in records.items():
            archive.writestr(f"model/data/{key}", content, compression)
    return path


def floats(count: int) -> bytes:
    return struct.pack(f"={count}f", *range(count))


def test_a_well_formed_archive_of_our_own_is_read(tmp_path):
    weights = {"w": Tensor(Storage("0", 6), 1, (2, 2), (2, 1)), "training": True, "names": None}
    path = script_archive(tmp_path / "a.pt", weights, {"0": floats(6)})
    state_dict = read_checkpoint(path)
    assert state_dict.keys() == {"w"} and state_dict["w"].tolist() == [[1, 2], [3, 4]]


LIES = {
    "more numbers than the record has": ({"w": Tensor(Storage("0", 1000), 0, (1000,), (1,))}, "4000 bytes"),
    "fewer numbers than the record has": ({"w": Tensor(Storage("0", 3), 0, (3,), (1,))}, "must have 12 bytes"),
    "a view outside the storage": ({"w": Tensor(Storage("0", 6), 4, (6,), (1,))}, "cannot be read"),
    "a negative offset": ({"w": Tensor(Storage("0", 6), -1, (6,), (1,))}, "cannot be read"),
    "a negative size": ({"w": Tensor(Storage("0", 6), 0, (-6,), (1,))}, "cannot be read"),
    "few bytes repeated endlessly": ({"w": Tensor(Storage("0", 6), 0, (2**20, 2**20), (0, 0))}, "it is corrupt"),
    "a record that is not there": ({"w": Tensor(Storage("7", 6), 0, (6,), (1,))}, "data/7"),
    "a record outside the archive": ({"w": Tensor(Storage("../../a.pt", 6), 0, (6,), (1,))}, "cannot be read"),
    "a key that is no text": ({"w": Tensor(Storage(7, 6), 0, (6,), (1,))}, "data/7"),
    "two dtypes of one record": (
        {
            "a": Tensor(Storage("0", 6), 0, (6,), (1,)),
            "b": Tensor(Storage("0", 6, torch.IntStorage), 0, (6,), (1,)),
        },
        "two dtypes",
    ),
    "a storage type of nowhere": ({"w": Tensor(Storage("0", 6, torch.QInt8Storage), 0, (6,), (1,))}, "QInt8Storage"),
    "a module inside itself": ({"w": "itself"}, "appears twice"),
    "no tensor": ({"training": True}, "must hold a state dict"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_archive_that_lies_is_refused(tmp_path, lie):
    attributes, message = LIES[lie]
    path = script_archive(tmp_path / "a.pt", attributes, {"0": floats(6)})
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_an_archive_that_grows_on_reading_is_refused(tmp_path):
    numel = 10**7
    weights = {"w": Tensor(Storage("0", numel), 0, (numel,), (1,))}
    bomb = script_archive(tmp_path / "a.pt", weights, {"0": bytes(4 * numel)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5
    with pytest.raises(ValueError, match="must be stored uncompressed"):
        read_checkpoint(bomb)
    # The same, and the directory says that it is not compressed.
    lying = bytearray(bomb.read_bytes())
    entry = lying.rindex(b"PK\x01\x02")
    struct.pack_into("<H", lying, entry + 10, zipfile.ZIP_STORED)
    bomb.write_bytes(lying)
    with pytest.raises(ValueError, match="claims 4000"):
        read_checkpoint(bomb)


def test_a_pickle_with_a_huge_object_number_takes_no_memory(source, tmp_path):
    # "Keep None as object 2**27": C's unpickler would take 2 GB for that.
    content = b"\x80\x02Nr" + struct.pack("<I", 2**27) + b"."
    path = rewritten(source.archive, tmp_path / "a.pt", lambda name, old: content if name == "data.pkl" else old)
    tracemalloc.start()
    with pytest.raises(ValueError, match="must hold a state dict.* got NoneType"):
        read_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("form", ["archive", "state_dict", "legacy"])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.7, 0.99, -1])
def test_a_truncated_file_is_refused(source, tmp_path, form, kept):
    whole = tmp_path / "whole.pt"
    torch.save(source.state_dict, whole, _use_new_zipfile_serialization=False)
    whole = {"archive": source.archive, "state_dict": source.file, "legacy": whole}[form].read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * kept)] if kept > 0 else whole[:kept])
    with pytest.raises(ValueError, match="cut.pt (is truncated|cannot be read as a checkpoint)"):
        convert(tmp_path / "cut.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["archive", "file"])
def test_a_file_with_a_hole_is_refused(source, tmp_path, form):
    whole = getattr(source, form).read_bytes()
    third = len(whole) // 3
    (tmp_path / "hole.pt").write_bytes(whole[:third] + whole[third + 1000 :])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "hole.pt")


def test_a_changed_byte_in_an_archive_is_noticed(source, tmp_path):
    content = bytearray(source.archive.read_bytes())
    with zipfile.ZipFile(source.archive) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    content[record.header_offset + 1000] ^= 1
    (tmp_path / "changed.pt").write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC"):
        read_checkpoint(tmp_path / "changed.pt")


FOREIGN = {
    "empty": (b"", "is empty"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read as a checkpoint"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read as a checkpoint"),
    "zeros": (bytes(4096), "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, kind):
    content, message = FOREIGN[kind]
    (tmp_path / "clip.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        convert(tmp_path / "clip.pt", tmp_path / "out")
    assert "weights_only" not in str(caught.value)  # torch's advice to load it all the same
    assert leftovers(tmp_path) == ["clip.pt"]


META = {"a": torch.zeros(1, device="meta")}


def test_what_is_no_state_dict_is_refused(tmp_path):
    for number, value in enumerate([torch.zeros(3), [torch.zeros(3)], {}, {"a": 3}, {3: torch.zeros(1)}, META]):
        torch.save(value, tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match="must hold a state dict"):
            read_checkpoint(tmp_path / f"{number}.pt")
    with zipfile.ZipFile(tmp_path / "documents.pt", "w") as archive:
        archive.writestr("letter.txt", b"text")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "documents.pt")
    with pytest.raises(ValueError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nowhere.pt")
