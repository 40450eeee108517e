"""--check_only of data sets that have every fault once: each is named by its row, in the log, a table and a sheet."""

import csv
import io
import tarfile
from pathlib import Path

import captioned_sets
import depth_sets
import numpy as np
import pytest
import tiny
import train_classification
import train_contrastive
import train_depth
import training_runs
from PIL import Image
from training_runs import REPO, run_here

from vit_embed.retrieval.pictures import ON_BLACK, ON_WHITE, SCALED


def spoil_labels(folder: Path) -> None:
    """A table of 24 pictures and of every fault that a row can have."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number in range(24):
        Image.new("RGB", (20, 20), (10 * number, 90, 0)).save(folder / "pictures" / f"{number}.png")
        lines.append(f"pictures/{number}.png,{'cat' if number % 2 else 'dog'},{'train' if number < 16 else 'val'}")
    icon = Image.new("RGBA", (20, 20))
    icon.paste((0, 0, 0, 255), (5, 5, 15, 15))
    icon.save(folder / "pictures" / "black.png")
    icon.paste((255, 255, 255, 255), (5, 5, 15, 15))
    icon.save(folder / "pictures" / "white.png")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "pictures" / "deep.png")
    whole = (folder / "pictures" / "3.png").read_bytes()
    (folder / "pictures" / "torn.png").write_bytes(whole[: len(whole) // 2])
    lines += [f"pictures/{name}.png,cat,train" for name in ("black", "white", "deep", "torn", "gone")]
    lines += ["pictures/5.png,,train", "pictures/6.png,cat,train,more", ",dog,train", "pictures/7.png,cow,val"]
    (folder / "labels.csv").write_text("\n".join(["image,label,split", *lines]))


LABELS = {
    "labels.csv:26": ON_WHITE,
    "labels.csv:27": ON_BLACK,
    "labels.csv:28": SCALED,
    "labels.csv:29": "an unreadable picture",
    "labels.csv:30": "a picture that is not there",
    "labels.csv:31": "no label",
    "labels.csv:32": "4 cells in a table of 3 columns",
    "labels.csv:33": "no path of a picture",
    "labels.csv:34": "a label outside the 2 known",
}


def spoil_captions(folder: Path) -> None:
    """A tar that breaks off, after samples with every fault that a sample can have."""
    folder.mkdir()
    texts = {**{f"{number:03}": f"a shade of {number}" for number in range(8)}, "damaged": "x", "empty": " "}
    texts |= {"long": "very " * 99 + "long", "lonely": "no picture", "zz": "behind the break"}
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for key, text in texts.items():
            picture = captioned_sets.content(len(key) + ord(key[-1]) % 9, "png")
            files = {"png": picture[:60] if key == "damaged" else picture, "txt": text.encode()}
            for suffix, content in files.items():
                if (key, suffix) == ("lonely", "png"):
                    continue
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    whole = (folder / "train-0.tar").read_bytes()
    (folder / "train-0.tar").write_bytes(whole[: whole.index(b"behind the break") - 600])


CAPTIONS = {
    "train-0.tar/damaged": "an unreadable picture",
    "train-0.tar/empty": "an empty caption",
    "train-0.tar/long": "a caption too long, cut",
    "train-0.tar/lonely": "no picture, but txt",
    "train-0.tar": "the rest of a tar that cannot be read",
}


def spoil_depths(folder: Path) -> None:
    """Pairs with every fault that a pair can have; `far` is beyond --max_depth 50."""
    for number in range(8):
        depth_sets.write_picture(folder / "images" / f"{number}.png", number)
        depth_sets.write_depth(folder / "depths" / f"{number}.png", depth_sets.metres(number))
    metres = depth_sets.metres(1)
    ramp = np.tile(np.linspace(1, 250, metres.shape[1], dtype=np.uint8), (len(metres), 1))
    arrays = {"8bit": ramp, "colours": np.stack([ramp] * 3, -1), "turned": (1000 * metres.T).astype(np.uint16)}
    arrays |= {"blind": np.zeros(metres.shape, np.uint16), "scaled": (10 * metres).astype(np.uint16)}
    arrays |= {"far": ((metres + 55) * 1000).clip(max=65535).astype(np.uint16)}
    pictures = {name: Image.fromarray(np.ascontiguousarray(array)) for name, array in arrays.items()}
    pictures["palette"] = Image.fromarray(ramp).convert("P")
    for name, picture in pictures.items():
        picture.save(folder / "depths" / f"{name}.png")
    (folder / "depths" / "torn.npy").write_bytes(b"\x93NUMPY no more")
    for name in (*pictures, "torn", "alone"):
        depth_sets.write_picture(folder / "images" / f"{name}.png", 2)
    depth_sets.write_depth(folder / "depths" / "unseen.png", metres)
    (folder / "images" / "noise.png").write_text("no picture")
    depth_sets.write_depth(folder / "depths" / "noise.png", metres)


DEPTHS = {
    "images/8bit.png": "a depth of 8 bits, at most 0.255 m",
    "images/colours.png": "a depth of equal channels",
    "images/palette.png": "palette",
    "images/turned.png": "a depth turned by 90 degrees",
    "images/blind.png": "a depth without a valid pixel",
    "images/scaled.png": "median",
    "images/far.png": "no valid pixel within --max_depth 50",
    "images/torn.png": "an unreadable depth",
    "images/alone.png": "a picture without a depth",
    "depths/unseen.png": "a depth without a picture",
    "images/noise.png": "an unreadable picture",
}
# recipe -> what spoils a data set, its faults by row, and the options that name a model
SPOILED = {
    train_classification: (spoil_labels, LABELS, {}),
    train_contrastive: (spoil_captions, CAPTIONS, {"text_config": training_runs.text_fields()}),
    train_depth: (spoil_depths, DEPTHS, {"max_depth": 50.0}),
}


@pytest.mark.parametrize("recipe", SPOILED, ids=lambda recipe: recipe.__name__)
def test_every_fault_is_named_by_its_row(recipe, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    spoil, faults, fields = SPOILED[recipe]
    spoil(tmp_path / "spoiled")
    tiny.vision_config(**fields).save_pretrained(tmp_path / "model")
    options = {"dataset": tmp_path / "spoiled", "config_name": tmp_path / "model", "output_dir": tmp_path / "looked"}
    options |= {"tokenizer_name": REPO} if recipe is train_contrastive else {}
    with caplog.at_level("INFO"):
        run_here(recipe, sheets=True, check_only=True, **options)
    with (tmp_path / "looked" / "check" / "found.csv").open(newline="") as file:
        found = {row["row"]: row["found"] for row in csv.DictReader(file)}
    assert {row: reason for row, reason in faults.items() if reason not in found.pop(row, "")} == {}
    assert found == {}, "nothing else is found fault with"
    for row in faults:
        assert f"'{row}'" in caplog.text, "the log names it, too"
    assert "left out" in caplog.text and "checked, nothing was trained" in caplog.text
    for sheet in ("rows", "found"):
        picture = Image.open(tmp_path / "looked" / "check" / f"{sheet}.png").convert("RGB")
        assert len(picture.getcolors(2**24)) > 50
