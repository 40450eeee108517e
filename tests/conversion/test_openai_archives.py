"""Files of torch: read as data, with nothing in them run; refused where they lie, are cut or are something else."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch._utils
from conversions import leftovers

from vit_embed.conversion.reading import read_checkpoint
from vit_embed.convert_checkpoint import convert_checkpoint

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
    convert_checkpoint(hostile, tmp_path / "out")
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
            read_checkpoint(path)
    assert leftovers(tmp_path) == ["files"]


def test_pickles_besides_the_weights_are_not_read(source, tmp_path):
    marker = tmp_path / "marker"
    pickled = pickle.dumps(Gadget(marker), protocol=2)
    others = ("constants.pkl", "traced_inputs.pkl")
    path = rewritten(source.archive, tmp_path / "a.pt", lambda name, old: pickled if name in others else old)
    assert read_checkpoint(path).keys() == source.state_dict.keys()
    assert not marker.exists()


@pytest.mark.parametrize("form", ["archive", "state_dict", "legacy"])
def test_a_truncated_file_is_refused(source, tmp_path, form):
    torch.save(source.state_dict, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    whole = {"archive": source.archive, "state_dict": source.file, "legacy": tmp_path / "legacy"}[form].read_bytes()
    for kept in (0.001, 0.3, 0.7, 0.99, 1):
        (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * kept) - (kept == 1)])
        with pytest.raises(ValueError, match="cut.pt (is truncated|cannot be read as a checkpoint)"):
            read_checkpoint(tmp_path / "cut.pt")


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
