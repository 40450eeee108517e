"""Data sets with depth as people have them: what each is read to, and what is said of faults or refused."""

import builtins
import contextlib
import logging
import re
import shutil
from pathlib import Path

import depth_sets
import numpy as np
import OpenEXR
import pytest
import tifffile
import tiny
import train_depth
from datasets import Dataset
from datasets import Image as ImageFeature
from depth_sets import SETS, kitti_selection, metres, pixels, write_depth, write_hdf5, write_picture
from PIL import Image
from scipy.io import savemat
from training_runs import run_here

from recipes.depth import DataArguments, load_pairs
from recipes.depth_checks import Checked, check_pairs
from recipes.reading.depth_files import Unusable, open_depth, open_picture, read_depth
from recipes.reading.depths import MILLIMETRES
from recipes.reading.tables import IMAGE, ROW
from vit_embed.retrieval.pictures import UNREADABLE, read_rgb

SIXTEEN = 0.51 / 1000  # half a millimetre, what whole numbers of them lose
# {data set: (rows of each split, the first row's name, metres that its numbers may be off by)}
EXPECTED = {
    "rooms": ({"train": 12, "validation": 6}, "train/images/0.png", SIXTEEN),
    "flat": ({"train": 12}, "images/0.png", 0),
    "scans": ({"train": 12}, "scene_00/color/0.jpg", 0),
    "frames": ({"train": 12, "validation": 6}, "train/seq-01/frame-000000.color.png", SIXTEEN),
    "kitchen": ({"train": 12}, "kitchen_0004/rgb_00000.jpg", SIXTEEN),
    "nyu-labelled": ({"train": 12, "test": 6}, "nyu_depth_v2_labeled.mat[0]", 0),
    "nyudepthv2": ({"train": 12, "validation": 6}, "train/kitchen_0004/00000.h5", 0),
    "kaggle-nyu": ({"train": 12, "test": 6}, "data/nyu2_train.csv:1", 0.51 / 25.5),
    "kitti": (
        {"train": 12, "validation": 6},
        "data_depth_annotated/train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000000.png",
        0.51 / 256,
    ),
    "kitti-selection": (
        {"validation": 6},
        "depth_selection/val_selection_cropped/image/2011_09_26_drive_0002_sync_image_0000000000_image_02.png",
        0.51 / 256,
    ),
    "kitti-list/train.txt": ({"train": 12}, "train.txt:1", 0.51 / 256),
    "tum": ({"train": 12, "validation": 6}, "train/rgbd_dataset_freiburg1_desk/rgb/1305031452.000000.png", 0.51 / 5000),
    "nyu-list": ({"train": 12, "test": 6}, "nyudepthv2_train_files_with_gt.txt:1", SIXTEEN),
    "table": ({"train": 12, "validation": 6}, "train.csv:2", SIXTEEN),
    "jsonl": ({"train": 12, "validation": 6}, "train.jsonl:1", 0),
    "parquet": ({"train": 12, "validation": 6}, "train.parquet row 0", 0),
    "saved": ({"train": 12, "validation": 6}, 0, 0),
    "patterns": ({"train": 12}, "scans/0/left/0_a.png", 0),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, caplog):
    """Data sets are named as in the docs: from where they lie."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)


def checked(dataset: str, max_depth: float | None = None, **fields) -> dict[str, Checked]:
    splits, scale = load_pairs(DataArguments(dataset=dataset, **fields))
    return {split: check_pairs(rows, split, scale, max_depth) for split, rows in splits.items()}


def write_folder(numbers: range, suffix: str = ".npy", dataset: str = "mine") -> Path:
    for n in numbers:
        write_picture(Path(dataset) / "images" / f"{n}.png", n)
        write_depth(Path(dataset) / "depths" / f"{n}{suffix}", metres(n), None)
    return Path(dataset) / "depths"


# --- layouts ---


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layout_reads_to_what_was_written(name):
    assert {*EXPECTED} == {*SETS, "kitti-selection"}
    {**SETS, "kitti-selection": kitti_selection}[name](Path(name))
    splits, scale = load_pairs(DataArguments(dataset=name, **depth_sets.OPTIONS.get(name, {})))
    found = {split: check_pairs(rows, split, scale, None) for split, rows in splits.items()}
    counts, first, tolerance = EXPECTED[name]
    assert {split: len(each.rows) for split, each in found.items()} == counts
    assert next(iter(found[s] for s in counts)).rows[ROW][0] == first
    for split, each in found.items():
        numbers = []
        for row in each.rows:
            shown = np.asarray(read_rgb(open_picture(row[IMAGE]))[0]).astype(float)
            numbers.append(round(shown[..., 2].mean() / 10))
            depth, expected = read_depth(row["depth"], scale, None), metres(numbers[-1])
            assert np.abs(shown[..., 0] / 40 - expected).max() < 0.15, "the picture is turned, or not of this depth"
            expected = expected * 3 if name.startswith("kitti") else expected
            np.testing.assert_allclose(depth, expected, rtol=1e-6, atol=tolerance)
        start = 12 if split != "train" and name != "kitti-selection" else 0
        assert sorted(numbers) == list(range(start, start + len(numbers)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rooms", "12 depths are whole numbers of 16 bits, divided by 1000 (millimetres, as neither"),
        ("kitti", "12 depths are whole numbers of 16 bits, divided by 256 (KITTI's)"),
        ("tum", "1 pictures have no depth within 0.02 s: rgb/1305031900.000000.png"),
        ("kaggle-nyu", "12 depths are whole numbers of 8 bits, divided by 25.5 (Kaggle's NYU"),
        ("flat", "12 depths are floating point numbers of 32 bits, which are metres"),
        ("nyu-list", "1 rows with a picture without a depth: ['nyudepthv2_train_files_with_gt.txt:13']"),
    ],
)
def test_what_is_divided_and_left_out_is_said(name, said, caplog):
    SETS[name](Path(name))
    checked(name)
    assert said in caplog.text


def test_a_flag_goes_before_the_scale_of_a_layout(caplog):
    SETS["kitti"](Path("kitti"))
    assert checked("kitti", depth_scale=512)["train"].median == pytest.approx(10.49 / 2, rel=0.01)
    assert "divided by 512 (--depth_scale)" in caplog.text
    SETS["flat"](Path("flat"))
    assert checked("flat", depth_scale=512)["train"].median == pytest.approx(3.5, abs=0.01)
    assert "split train: --depth_scale changes nothing, it divides whole numbers alone" in caplog.text


def test_virtual_kitti_is_in_centimetres():
    for n in range(3):
        frames = Path("vkitti") / "Scene01" / "clone" / "frames"
        write_picture(frames / "rgb" / "Camera_0" / f"rgb_{n:05}.jpg", n)
        write_depth(frames / "depth" / "Camera_0" / f"depth_{n:05}.png", metres(n), 100)
    assert checked("vkitti")["train"].median == pytest.approx(3.6, abs=0.1)


def test_pictures_of_kitti_may_lie_elsewhere(caplog):
    SETS["kitti"](Path("kitti"))
    shutil.move("kitti/raw", "raw")
    with pytest.raises(ValueError, match="nearest: KITTI .* it lacks pictures in DRIVE/image_02/data below --dataset"):
        checked("kitti")
    Path("raw/2011_09_26/2011_09_26_drive_0001_sync/image_03/data/0000000001.png").unlink()
    assert len(checked("kitti", image_folder="raw")["train"].rows) == 11
    assert "1 rows with a depth without a picture: ['data_depth_annotated/train/2011_09_26_drive_0001" in caplog.text


def test_the_selection_of_kitti_is_no_validation_beside_val():
    for build in (SETS["kitti"], kitti_selection):
        build(Path("kitti"))
    found = {split: len(each.rows) for split, each in checked("kitti").items()}
    assert found == {"train": 12, "validation": 6, "val_selection_cropped": 6}


def test_times_of_tum_pair_once_each_with_the_nearest():
    """Two pictures near one depth: the nearer one gets it, and the other none though another depth is 21 ms away."""
    for kind, times in (("rgb", (1.0, 1.01, 2.0)), ("depth", (1.008, 1.031, 2.019))):
        Path(f"desk/{kind}").mkdir(parents=True)
        Path(f"desk/{kind}.txt").write_text("# comment\n" + "".join(f"{t:.3f} {kind}/{t:.3f}.png\n" for t in times))
    rows = load_pairs(DataArguments(dataset="desk"))[0]["train"]
    assert list(zip(rows[IMAGE], rows["depth"])) == [
        ("desk/rgb/1.010.png", "desk/depth/1.008.png"),
        ("desk/rgb/2.000.png", "desk/depth/2.019.png"),
    ]


def test_associations_may_name_the_depth_first():
    SETS["tum"](Path("tum"))
    file = Path("tum/val/rgbd_dataset_freiburg1_room/associations.txt")
    lines = [line.split() for line in file.read_text().splitlines() if line[0] != "#"]
    file.write_text("".join(f"{c[2]} {c[3]} {c[0]} {c[1]}\n" for c in lines))
    assert "/rgb/" in load_pairs(DataArguments(dataset="tum"))[0]["validation"][0][IMAGE]
    file.write_text("1.0 rgb/1.png 1.0 range/1.png\n")
    with pytest.raises(ValueError, match="TIME depth/FILE in .*freiburg1_room/associations.txt, got '1.0 rgb/1.png 1"):
        load_pairs(DataArguments(dataset="tum"))
    Path("tum/train/rgbd_dataset_freiburg1_desk/depth.txt").write_text("# comment\n1.0\n")
    with pytest.raises(ValueError, match="TIME FILE in .*freiburg1_desk/depth.txt, got '1.0' in line 2"):
        load_pairs(DataArguments(dataset="tum"))


def test_a_pair_in_no_split_is_left_out_and_named(caplog):
    SETS["rooms"](Path("rooms"))
    shutil.copytree("rooms/train", "rooms/more")
    assert len(checked("rooms")["train"].rows) == 12
    assert "12 pairs are left out, as no folder of theirs is a split: more/images/0.png" in caplog.text


@pytest.mark.parametrize(
    ("image_glob", "depth_glob", "message"),
    [
        ("images/*.png", "depths/*.exr", r"--depth_glob with wildcards .* matches 0 .*its files are depths/0.npy"),
        ("images/0.png", "depths/*.npy", "--image_glob with wildcards that match files in mine, .* has 0 wildcards"),
        (
            "*/*.png",
            "*/*.npy",
            r"match the same in both .* got 'images/0' of images/0.png and 'depths/0' of depths/0.npy",
        ),
        ("images/[0-9].png", "depths/?.npy", None),
        ("**/*.png", "depths/*.npy", "match the same in both files"),
        ("mine/images/*.png", "mine/depths/*.npy", None),
    ],
)
def test_patterns_that_cannot_pair_are_refused_with_examples(image_glob, depth_glob, message):
    write_folder(range(3))
    if message is None:
        assert len(checked("mine", image_glob=image_glob, depth_glob=depth_glob)["train"].rows) == 3
    else:
        with pytest.raises(ValueError, match=message):
            checked("mine", image_glob=image_glob, depth_glob=depth_glob)


@pytest.mark.parametrize(
    ("file", "image_axes", "depth_axes"),
    [
        ("train.mat", (3, 2, 1), (2, 1)),  # C, W, H
        ("train.h5", (3, 2, 1), (2, 1)),
        ("train.h5", (3, 1, 2), (1, 2)),
        ("train.h5", (1, 2, 3), (1, 2)),
    ],
)
def test_axes_of_a_stack_are_told_by_their_lengths(file, image_axes, depth_axes):
    images, depths = (np.stack([of(n) for n in range(3)]) for of in (pixels, metres))
    write_hdf5(Path("nyu") / file, images=images.transpose(0, *image_axes), depths=depths.transpose(0, *depth_axes))
    row = load_pairs(DataArguments(dataset="nyu"))[0]["train"][2]
    assert row[ROW] == f"{file}[2]" and np.array_equal(np.asarray(open_picture(row[IMAGE])), pixels(2))
    np.testing.assert_array_equal(open_depth(row["depth"]), metres(2))


def test_stacks_that_are_torn_or_whose_axes_are_not_told_are_refused(caplog):
    square = np.ones((2, 3, 24, 24), np.uint8), np.ones((2, 24, 24), np.float32)
    write_hdf5(Path("nyu/train.h5"), images=square[0], depths=square[1])
    with pytest.raises(ValueError, match=r"wider than high, in train.h5, got \(2, 3, 24, 24\) and \(2, 24, 24\)"):
        load_pairs(DataArguments(dataset="nyu"))
    SETS["nyu-labelled"](Path("nyu"))
    Path("nyu/train.h5").write_bytes(Path("nyu/train.h5").read_bytes()[:900])
    assert len(load_pairs(DataArguments(dataset="nyu"))[0]["train"]) == 18
    assert "nyu/train.h5 is left out: it is damaged, or has no images and depths" in caplog.text
    file = Path("nyu/nyu_depth_v2_labeled.mat")
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(ValueError, match="HDF5 in nyu/nyu_depth_v2_labeled.mat, it is damaged or breaks off"):
        load_pairs(DataArguments(dataset="nyu"))


def test_a_table_of_something_else_does_not_hide_the_folders():
    folder = write_folder(range(3))
    Path("mine/labels.csv").write_text("0.png,kitchen\n1.png,hall\n")
    assert checked("mine")["train"].rows["depth"][0] == str(folder / "0.npy")


def test_masks_beside_pictures_are_no_depths():
    """As DIODE has them."""
    for n in range(3):
        write_picture(Path(f"diode/val/scan_00183/00019_indoors_{n:03}.png"), n)
        for kind, array in (("depth", metres(n)[..., None]), ("depth_mask", metres(n) > 0)):
            np.save(f"diode/val/scan_00183/00019_indoors_{n:03}_{kind}.npy", array)
    rows = checked("diode")["validation"].rows
    assert [Path(file).name for file in rows["depth"]] == [f"00019_indoors_{n:03}_depth.npy" for n in range(3)]


def test_paths_of_a_list_may_start_above_it_with_a_slash():
    SETS["nyu-list"](Path("nyu"))
    Path("nyu/lists").mkdir()
    for file in list(Path("nyu").glob("*.txt")):
        file.rename(Path("nyu/lists") / file.name)
    assert len(checked("nyu/lists/nyudepthv2_train_files_with_gt.txt")["train"].rows) == 12


def test_a_column_that_no_table_has_is_refused():
    SETS["table"](Path("table"))
    SETS["jsonl"](Path("jsonl"))
    with pytest.raises(ValueError, match="expected a table for --depth_column, table is read as: folders of pictures"):
        load_pairs(DataArguments(dataset="table", depth_column="metres"))
    with pytest.raises(ValueError, match="nearest: table of depths .* lacks a table with a column .*--depth_column"):
        load_pairs(DataArguments(dataset="jsonl", depth_column="metres"))


# --- formats ---


def two_channels(path: Path, depth: np.ndarray) -> None:
    OpenEXR.File({}, {"ViewLayer.Depth.Z": depth, "ViewLayer.Combined.A": depth + 9}).write(str(path))


FORMATS = {
    "16 bit .png": (".png", lambda p, d: write_depth(p, d), SIXTEEN),
    "16 bit .tif": (".tif", lambda p, d: write_depth(p, d), SIXTEEN),
    "float .tif": (".tif", lambda p, d: Image.fromarray(d).save(p, compression="tiff_adobe_deflate"), 0),
    "float .npy": (".npy", np.save, 0),
    "big-endian .npy": (".npy", lambda p, d: np.save(p, d.astype(">f8")), 0),
    "half .npy": (".npy", lambda p, d: np.save(p, d.astype(np.float16)), 2e-3),
    "millimetres in .npy": (".npy", lambda p, d: np.save(p, np.round(d * 1000).astype(np.int32)), SIXTEEN),
    ".npz of one": (".npz", lambda p, d: np.savez_compressed(p, d), 0),
    ".npz of several": (".npz", lambda p, d: np.savez(p, depth=d, mask=d > 0), 0),
    "little .pfm": (".pfm", depth_sets.write_pfm, 0),
    "big .pfm": (".pfm", lambda p, d: depth_sets.write_pfm(p, d, ">"), 0),
    "float .exr": (".exr", depth_sets.write_exr, 0),
    "half .exr": (".exr", lambda p, d: depth_sets.write_exr(p, d.astype(np.float16), "Y"), 2e-3),
    ".exr of layers": (".exr", two_channels, 0),
    ".h5": (".h5", lambda p, d: write_hdf5(p, depth=d[None]), 0),
    ".mat": (".mat", lambda p, d: write_hdf5(p, depth=d.T), 0),
    ".h5 of several": (".h5", lambda p, d: write_hdf5(p, depth=d, valid=d > 0), 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_metres_that_were_written(name):
    suffix, write, tolerance = FORMATS[name]
    for n in range(2):
        write_picture(Path("mine/images") / f"{n}.png", n)
        Path("mine/depths").mkdir(exist_ok=True)
        write(Path(f"mine/depths/{n}{suffix}"), metres(n))
    rows = checked("mine")["train"].rows
    for n, row in enumerate(rows):
        np.testing.assert_allclose(read_depth(row["depth"], MILLIMETRES, None), metres(n), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["16 bit .png", "float .tif", "float .npy", ".npz of one", "little .pfm", "float .exr", ".h5"]
)
def test_torn_and_missing_files_raise_what_training_takes_for_unreadable(name):
    """At every kind of place: none is read as another depth without a word, and nothing else is raised."""
    suffix, write, _ = FORMATS[name]
    path, random = Path(f"depth{suffix}"), np.random.default_rng(0)
    write(path, metres(0))
    whole, expected = path.read_bytes(), open_depth(str(path))
    for length in {0, 1, 7, *random.integers(8, len(whole) - 16, 24).tolist()}:
        path.write_bytes(whole[:length])
        with pytest.raises(UNREADABLE) as caught:
            open_depth(str(path))
        assert not isinstance(caught.value, Unusable) or "an unreadable .tif" in str(caught.value)
    for place in random.integers(0, min(len(whole), 600), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(UNREADABLE):
            open_depth(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_depth(str(path))
    assert expected.shape == metres(0).shape


def test_a_torn_picture_inside_hdf5_is_unreadable():
    SETS["nyudepthv2"](Path("nyudepthv2"))
    row = load_pairs(DataArguments(dataset="nyudepthv2"))[0]["train"][0]
    file = Path(row[IMAGE]["file"])
    file.write_bytes(file.read_bytes()[:500])
    for read in (lambda: open_picture(row[IMAGE]), lambda: open_depth(row["depth"])):
        with pytest.raises(UNREADABLE):
            read()


@pytest.mark.parametrize(("suffix", "library"), [(".exr", "OpenEXR"), (".h5", "h5py")])
def test_a_missing_library_is_named_before_the_rows(suffix, library, monkeypatch):
    write_folder(range(2), suffix)
    loaded = builtins.__import__

    def without(name, *args, **kwargs):
        if name == library:
            raise ImportError(name)
        return loaded(name, *args, **kwargs)

    monkeypatch.setattr("recipes.reading.depth_files.importlib.import_module", without)
    with pytest.raises(ValueError, match=f"expected the library {library} for .*; pip install {library}"):
        load_pairs(DataArguments(dataset="mine"))


# --- faults ---


def saved_as(depth: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray((depth * 50).astype(np.uint8)).convert(mode)


COLOURS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
DEPTH = metres(9)
# {name: (suffix of the depth, what writes it, what is said of it)}; all are left out.
FAULTS = {
    "palette": (".png", lambda p: saved_as(DEPTH, "P").save(p), "a palette PNG for a depth, whose numbers stand for"),
    "eight": (".png", lambda p: saved_as(DEPTH, "L").save(p), "a depth of 8 bits, at most 0.255 m with --depth_scale"),
    "bit": (".png", lambda p: saved_as(DEPTH, "1").save(p), "a depth of 2 axes of bool instead of one number a pixel"),
    "grey": (
        ".png",
        lambda p: saved_as(DEPTH, "RGB").save(p),
        "a depth of equal channels, one number saved as a colour",
    ),
    "colour": (
        ".png",
        lambda p: Image.fromarray(COLOURS).save(p),
        "a depth of 3 channels, which is a picture of depth",
    ),
    "rgba": (".png", lambda p: Image.fromarray(COLOURS).convert("RGBA").save(p), "a depth of 4 channels"),
    "lossy": (".jpg", lambda p: saved_as(DEPTH, "L").save(p), "a JPEG for a depth, which changes its numbers"),
    "pf": (".pfm", lambda p: p.write_bytes(b"PF\n32 24\n-1\n" + bytes(range(96)) * 96), "a depth of 3 channels"),
    "keys": (".npz", lambda p: np.savez(p, a=DEPTH, b=DEPTH), "a file of several arrays, a, b: name one of them depth"),
    "pickle": (".npy", lambda p: np.save(p, np.array([{}])), "an unreadable depth"),
    "torn": (".png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "an unreadable depth"),
    "dangling": (".png", lambda p: p.symlink_to("nothing"), "a depth whose file is missing"),
    "deep": (
        ".tif",
        lambda p: tifffile.imwrite(p, DEPTH.astype(float)),
        "an unreadable .tif; whole numbers and floats of 32 bits are read",
    ),
    "old": (".mat", lambda p: savemat(p, {"depth": DEPTH}), "a .mat of before version 7.3"),
    "empty": (".npy", lambda p: np.save(p, 0 * DEPTH), "a depth without a valid pixel"),
    "turned": (".npy", lambda p: np.save(p, DEPTH.T), "a depth turned by 90 degrees against its picture"),
    "cut": (".npy", lambda p: np.save(p, DEPTH[:10]), "a depth of another shape than its picture"),
    "millimetres": (".npy", lambda p: np.save(p, 1000 * DEPTH), "a median depth outside 0.2 to 200 m"),
    "inverse": (".npy", lambda p: np.save(p, DEPTH / 100), "a median depth outside 0.2 to 200 m"),
    "beyond": (".npy", lambda p: np.save(p, 30 + DEPTH), "no valid pixel within --max_depth 20"),
    "infinite": (".npy", lambda p: np.save(p, np.inf + DEPTH), "a depth without a valid pixel"),
}
# What is said of a depth that is kept.
ODD = {
    "half": (
        ".npy",
        lambda p: np.save(p, DEPTH[::2, ::2]),
        "a depth of another size than its picture",
    ),
    "whole": (".npy", lambda p: np.save(p, np.round(DEPTH)), "a depth of nothing but whole numbers of metres"),
}


def test_every_fault_of_a_spoiled_set_is_named_with_its_file_and_left_out(caplog):
    folder = write_folder(range(20))
    for name, (suffix, write, _) in {**FAULTS, **ODD}.items():
        write_picture(Path(f"mine/images/{name}.png"), 9)
        write(folder / f"{name}{suffix}")
    write_picture(Path("mine/images/alone.png"), 9)
    np.save(folder / "blind.npy", DEPTH)
    rows = checked("mine", max_depth=20)["train"].rows
    assert sorted(rows[ROW]) == sorted(f"images/{n}.png" for n in (*range(20), *ODD))
    others = {"alone": (0, 0, "a picture without a depth"), "blind": (0, 0, "a depth without a picture")}
    for name, (_, _, said) in {**FAULTS, **ODD, **others}.items():
        file = "depths/blind.npy" if name == "blind" else f"images/{name}.png"
        assert re.search(f"rows with {said}[^\\[]*: \\[[^]]*'{file}'", caplog.text), name


def test_pixels_beyond_the_largest_depth_are_counted_and_most_are_refused(caplog):
    write_folder(range(4))
    checked("mine", max_depth=4.5)
    share = re.search(r"(\d+) of (\d+) measured pixels \((.*)%\) lie beyond --max_depth 4.5", caplog.text)
    beyond = sum(int((metres(n) > 4.5).sum()) for n in range(4))
    assert int(share[1]) == beyond and float(share[3]) == pytest.approx(100 * beyond / int(share[2]), abs=0.05)
    with pytest.raises(ValueError, match=r"within --max_depth 3, \d+ of \d+ measured pixels \(6.*%\).*raise it"):
        checked("mine", max_depth=3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda: np.save("mine/depths/0.npy", (1000 * metres(0)).astype(np.uint16)),
            r"none of 1 are: 1 with a median.*medians of 3.*e[+]03 .* m; .*by 1 \(--depth_scale\).*: set --dep",
        ),
        (
            lambda: shutil.rmtree("mine/depths"),
            "nearest: folders of pictures and depths .* lacks a folder depths or depth beside it",
        ),
        (
            lambda: shutil.copy("mine/images/0.png", "mine/images/0.jpg"),
            "one picture and one depth of the name '0', found images/0.jpg and images/0.png; remove",
        ),
    ],
)
def test_data_that_is_all_wrong_is_refused_with_what_to_set(spoil, message):
    write_folder(range(1))
    spoil()
    with pytest.raises(ValueError, match=message):
        checked("mine", depth_scale=1)


def test_rows_without_depths_are_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"expected columns \['depth'\] in split 'x'.*--depth_column"):
        check_pairs(Dataset.from_dict({"image": ["a"]}), "x", MILLIMETRES, None)


def test_nothing_but_whole_metres_is_refused():
    for path in write_folder(range(3)).iterdir():
        np.save(path, np.round(np.load(path)))
    with pytest.raises(ValueError, match="all of split 'train' are whole numbers of them, with medians of 4 to 4 m; "):
        checked("mine")


@pytest.mark.parametrize(
    ("write", "is_said"),
    [
        (lambda depth: depth, False),
        (lambda depth: 2 / np.where(depth > 0, depth, 1) * (depth > 0), True),  # inverse depth, all of it plausible
        (lambda depth: depth[::-1], True),
        (lambda depth: np.random.default_rng(0).uniform(1, 5, depth.shape), False),
    ],
)
def test_depths_that_grow_downwards_are_said_to_be_perhaps_none(write, is_said, caplog):
    folder = write_folder(range(10))
    for n in range(10):
        np.save(folder / f"{n}.npy", write(metres(n)))
    checked("mine")
    assert ("10 of 10 depths grow towards the bottom of the picture" in caplog.text) == is_said


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda depth: depth / depth.max(), "end at exactly 1, as normalised numbers do"),
        (lambda depth: np.where(depth > 0, 1000 * depth, 65535).astype(np.uint16), "reach 65535"),
        (
            lambda depth: (1000 * depth).astype(np.uint16) * 8,
            "are multiples of 8, as the rotated bits of SUN RGB-D are",
        ),
        (lambda depth: (25 * depth).astype(np.uint16) * 257, "are multiples of 257, as 8 bits stretched to 16 are"),
    ],
)
def test_numbers_that_look_like_no_distances_are_said(write, said, caplog):
    folder = write_folder(range(4))
    checked("mine")
    assert said not in caplog.text
    for n in range(4):
        np.save(folder / f"{n}.npy", write(metres(n)))
    checked("mine")
    assert f"split train: 4 of 4 depths {said}" in caplog.text


@pytest.mark.parametrize(
    ("picture", "depth"),
    [
        ("left/0.png", "disparity/0.pfm"),
        ("Adirondack/im0.png", "Adirondack/disp0.pfm"),
        ("image_2/000000_10.png", "disp_occ_0/000000_10.png"),
        ("images/0.png", "depths/disp_0.png"),
    ],
)
def test_disparity_is_refused_by_its_name_with_what_to_do(picture, depth):
    write_picture(Path("stereo") / picture, 0)
    write_depth(Path("stereo") / depth, metres(0), None if depth.endswith("pfm") else 256)
    with pytest.raises(ValueError, match=f"got disparity by the name of {depth}; write focal length . baseline"):
        load_pairs(DataArguments(dataset="stereo"))


def test_a_table_whose_folders_are_mixed_up_is_refused_or_told():
    """Names alone, of pictures in images/ and depths in depths/; and a picture that is given as its own depth."""
    SETS["table"](Path("table"))
    rows = load_pairs(DataArguments(dataset="table"))[0]["train"]
    assert rows["depth"][0] == "table/depths/0.png"
    shutil.move("table/depths", "table/elsewhere")
    flags = {"image_folder": "table/images", "depth_folder": "table/elsewhere"}
    assert len(checked("table", **flags)["train"].rows) == 12
    with pytest.raises(ValueError, match="none of 12 are: 12 with one file in the columns 'rgb' and 'depth'"):
        checked("table", image_folder="table/images")


def test_files_of_a_saved_data_set_that_cannot_be_decoded_are_told_apart(caplog):
    write_folder(range(3), ".tif")
    rows = load_pairs(DataArguments(dataset="mine"))[0]["train"].cast_column(IMAGE, ImageFeature())
    Path("mine/images/0.png").write_bytes(b"nothing")
    Path("mine/images/1.png").unlink()
    assert check_pairs(rows, "train", MILLIMETRES, None).rows[ROW][:] == ["images/2.png"]
    assert "1 rows with an unreadable picture: ['images/0.png']" in caplog.text
    assert "1 rows with a picture whose file is missing: ['images/1.png']" in caplog.text


def test_cells_of_bytes_are_opened():
    write_depth(Path("0.png"), metres(0))
    write_picture(Path("rgb.png"), 0)
    cells = [
        Path("0.png").read_bytes(),
        {"bytes": Path("0.png").read_bytes(), "path": None},
        {"bytes": None, "path": "0.png"},
    ]
    for cell in cells:
        np.testing.assert_allclose(read_depth(cell, MILLIMETRES, None), metres(0), atol=SIXTEEN)
    row = {"image": {"bytes": Path("rgb.png").read_bytes(), "path": None}, "depth": cells[0]}
    assert np.array_equal(read_rgb(open_picture(row["image"]))[0], pixels(0))
    assert len(check_pairs(Dataset.from_list([row]), "x", MILLIMETRES, None).rows) == 1


# --- training ---


def test_splits_of_another_scale_are_said_before_the_first_step(caplog):
    SETS["rooms"](Path("rooms"))
    for n in depth_sets.SPLITS["validation"]:
        write_depth(Path(f"rooms/validation/depths/{n}.png"), 8 * metres(n))
    tiny.vision_config(max_depth=50.0).save_pretrained("config")
    options = {"do_train": True, "do_eval": True, "max_steps": 1, "config_name": "config", "output_dir": "run"}
    run_here(train_depth, dataset="rooms", **options)
    assert "(--depth_scale): 3.5 m in split 'train', 26.2 m in split 'validation'" in caplog.text
