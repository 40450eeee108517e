"""Small data sets with depth as people have them, whose pictures tell it: red / 40 is metres, blue / 10 the number."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import OpenEXR
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from PIL import Image
from scipy.io import savemat

HEIGHT, WIDTH = 24, 32
SPLITS = {"train": range(12), "validation": range(12, 18)}
MILLIMETRES, KITTI, TUM = 1000, 256, 5000


def metres(number: int) -> np.ndarray:
    """(H, W): from 5 m at the top to 1 m at the bottom, farther to the right; 0, not measured, in a corner."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    depth = 5 - 3.4 * rows / HEIGHT + 0.6 * columns / WIDTH - number / 40
    depth[:3, :4] = 0
    return depth.astype(np.float32)


def pixels(number: int) -> np.ndarray:
    depth = metres(number)
    return np.stack([np.round(40 * depth), np.full_like(depth, 128), np.full_like(depth, 10 * number)], -1).astype(
        np.uint8
    )


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path, quality=98, subsampling=0)


def write_hdf5(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def write_pfm(path: Path, depth: np.ndarray, order: str = "<") -> None:
    scale = -1.0 if order == "<" else 1.0
    header = f"Pf\n{depth.shape[1]} {depth.shape[0]}\n{scale}\n"
    path.write_bytes(header.encode() + depth[::-1].astype(f"{order}f4").tobytes())


def write_exr(path: Path, depth: np.ndarray, channel: str = "Z") -> None:
    OpenEXR.File({"type": OpenEXR.scanlineimage}, {channel: np.ascontiguousarray(depth)}).write(str(path))


def write_depth(path: Path, depth: np.ndarray, scale: float | None = MILLIMETRES) -> None:
    """By the suffix; a scale makes whole numbers of 16 bits, None keeps what is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = depth if scale is None else np.round(depth * scale).astype(np.uint16)
    writers: dict[str, Callable] = {
        ".npy": np.save,
        ".npz": lambda path, depth: np.savez(path, depth=depth),
        ".pfm": write_pfm,
        ".exr": write_exr,
        ".h5": lambda path, depth: write_hdf5(path, depth=depth),
    }
    writers.get(path.suffix, lambda path, depth: Image.fromarray(depth).save(path))(path, stored)


# --- layouts ---


TRAIN = {"train": SPLITS["train"]}


def pairs(picture: str, depth: str, scale: float | None = MILLIMETRES, splits: dict = SPLITS) -> Callable[[Path], None]:
    """What writes every picture and its depth to these names, of {split} and {n}, in {scene} the {k}-th."""

    def write(path: Path) -> None:
        for split, numbers in splits.items():
            for n in numbers:
                place = {"split": split, "n": n, "scene": n // 6, "k": n % 6}
                write_picture(path / picture.format(**place), n)
                write_depth(path / depth.format(**place), metres(n), scale)

    return write


def nyu_labelled(path: Path) -> None:
    """As MATLAB writes: axes reversed."""
    images, depths = (np.stack([of(n) for n in range(18)]) for of in (pixels, metres))
    write_hdf5(path / "nyu_depth_v2_labeled.mat", images=images.transpose(0, 3, 2, 1), depths=depths.transpose(0, 2, 1))
    train, test = (np.array(SPLITS[split])[:, None] + 1.0 for split in SPLITS)
    savemat(path / "splits.mat", {"trainNdxs": train, "testNdxs": test})


def nyu_singles(path: Path) -> None:
    for folder, split in (("train/kitchen_0004", "train"), ("val/official", "validation")):
        for n in SPLITS[split]:
            write_hdf5(path / folder / f"{n:05}.h5", rgb=pixels(n).transpose(2, 0, 1), depth=metres(n))


def kaggle(path: Path) -> None:
    """8 bits, of which 255 is 10 m, for training; 16 bits of millimetres for testing; no header."""
    for split, numbers in (("train", SPLITS["train"]), ("test", SPLITS["validation"])):
        lines = []
        for n in numbers:
            scene = f"data/nyu2_{split}" + ("/kitchen_0004_out" if split == "train" else "")
            names = (f"{n}.jpg", f"{n}.png") if split == "train" else (f"{n:05}_colors.png", f"{n:05}_depth.png")
            write_picture(path / scene / names[0], n)
            stored = np.round(metres(n) * 25.5).astype(np.uint8) if split == "train" else metres(n)
            write_depth(path / scene / names[1], stored, None if split == "train" else MILLIMETRES)
            lines.append([f"{scene}/{name}" for name in names])
        with (path / "data" / f"nyu2_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)


def kitti(path: Path) -> None:
    """With depths that are only projected, and pictures without depth, as the whole data set has."""
    for split, drive in (("train", "2011_09_26_drive_0001_sync"), ("val", "2011_09_26_drive_0002_sync")):
        numbers = SPLITS["train" if split == "train" else "validation"]
        raw, annotated = path / "raw" / drive[:10] / drive, path / "data_depth_annotated" / split / drive / "proj_depth"
        for n in numbers:
            camera = f"image_0{2 + n % 2}"
            write_picture(raw / camera / "data" / f"{n:010}.png", n)
            write_depth(annotated / "groundtruth" / camera / f"{n:010}.png", 3 * metres(n), KITTI)
            write_depth(annotated / "velodyne_raw" / camera / f"{n:010}.png", metres(n) + 40, KITTI)
        write_picture(raw / "image_02" / "data" / f"{99:010}.png", 0)


def kitti_selection(path: Path) -> None:
    folder = path / "depth_selection" / "val_selection_cropped"
    for n in range(6):
        start, end = "2011_09_26_drive_0002_sync", f"{n:010}_image_02.png"
        write_picture(folder / "image" / f"{start}_image_{end}", n)
        write_depth(folder / "groundtruth_depth" / f"{start}_groundtruth_depth_{end}", 3 * metres(n), KITTI)


def tum_sequence(path: Path, numbers: range, is_associated: bool) -> None:
    lists: dict[str, list[str]] = {"rgb": [], "depth": [], "both": []}
    for n in numbers:
        rgb, depth = f"{1305031452 + n / 30:.6f}", f"{1305031452 + n / 30 + 0.004:.6f}"
        lists["rgb"].append(f"{rgb} rgb/{rgb}.png")
        lists["depth"].append(f"{depth} depth/{depth}.png")
        lists["both"].append(f"{lists['rgb'][-1]} {lists['depth'][-1]}")
        write_picture(path / "rgb" / f"{rgb}.png", n)
        write_depth(path / "depth" / f"{depth}.png", metres(n), TUM)
    lists["rgb"].append("1305031900.000000 rgb/1305031900.000000.png")  # without depth in time
    comment = "# color images\n# timestamp filename\n"
    for name, lines in {"associations": lists["both"]}.items() if is_associated else list(lists.items())[:2]:
        (path / f"{name}.txt").write_text(comment + "\n".join(lines) + "\n")


def tum(path: Path) -> None:
    tum_sequence(path / "train" / "rgbd_dataset_freiburg1_desk", SPLITS["train"], False)
    tum_sequence(path / "val" / "rgbd_dataset_freiburg1_room", SPLITS["validation"], True)


def list_of_two(path: Path) -> None:
    """With a focal length a row, paths that begin with a slash, and a depth that is missing, as BTS's."""
    for split, numbers in (("train", SPLITS["train"]), ("test", SPLITS["validation"])):
        lines = [f"/{n // 6}/rgb_{n:05}.jpg /{n // 6}/sync_depth_{n:05}.png 518.8579" for n in numbers]
        lines += ["/0/rgb_00000.jpg None 518.8579"] if split == "train" else []
        for n in numbers:
            write_picture(path / f"{n // 6}" / f"rgb_{n:05}.jpg", n)
            write_depth(path / f"{n // 6}" / f"sync_depth_{n:05}.png", metres(n))
        (path / f"nyudepthv2_{split}_files_with_gt.txt").write_text("\n".join(lines) + "\n")


def kitti_list(path: Path) -> None:
    """The list itself, beside the data."""
    kitti(path.parent)
    drive, lines = "2011_09_26_drive_0001_sync", []
    for n in SPLITS["train"]:
        file = f"image_0{2 + n % 2}/data/{n:010}.png"
        depth = f"data_depth_annotated/train/{drive}/proj_depth/groundtruth/{file.replace('data/', '')}"
        lines.append(f"raw/2011_09_26/{drive}/{file} {depth} 721.5377")
    path.write_text("\n".join(lines) + "\n")


def table(path: Path) -> None:
    for split, numbers in SPLITS.items():
        for n in numbers:
            write_picture(path / "images" / f"{n}.png", n)
            write_depth(path / "depths" / f"{n}.png", metres(n))
        with (path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["rgb", "depth"], *([f"{n}.png", f"{n}.png"] for n in numbers)])


def jsonl(path: Path) -> None:
    for split, numbers in SPLITS.items():
        for n in numbers:
            write_picture(path / "left" / f"{n}.jpg", n)
            write_depth(path / "metres" / f"{n}.npz", metres(n), None)
        rows = [{"file_name": f"left/{n}.jpg", "depth_path": f"metres/{n}.npz"} for n in numbers]
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def parquet(path: Path) -> None:
    """Pictures as bytes, depths as paths."""
    path.mkdir(parents=True)
    for split, numbers in SPLITS.items():
        cells = []
        for n in numbers:
            write_picture(path / "tmp.png", n)
            cells.append((path / "tmp.png").read_bytes())
            write_depth(path / "depths" / f"{n}.npy", metres(n), None)
        (path / "tmp.png").unlink()
        table = pa.table({"image": cells, "depth": [f"depths/{n}.npy" for n in numbers]})
        pq.write_table(table, path / f"{split}.parquet")


def saved(path: Path) -> None:
    rows = {s: [{"image": Image.fromarray(pixels(n)), "depth_map": metres(n)} for n in ns] for s, ns in SPLITS.items()}
    DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()}).save_to_disk(path)


# {name of a data set as in docs/your-data.md: what writes it to that path}.
SETS: dict[str, Callable[[Path], None]] = {
    "rooms": pairs("{split}/images/{n}.png", "{split}/depths/{n}.png"),
    "flat": pairs("images/{n}.png", "depths/{n}.npy", None, TRAIN),
    "scans": pairs("scene_{scene:02}/color/{k}.jpg", "scene_{scene:02}/depth/{k}.tif", None, TRAIN),
    "frames": pairs("{split}/seq-01/frame-{n:06}.color.png", "{split}/seq-01/frame-{n:06}.depth.png"),
    "kitchen": pairs("kitchen_0004/rgb_{n:05}.jpg", "kitchen_0004/sync_depth_{n:05}.png", splits=TRAIN),
    "nyu-labelled": nyu_labelled,
    "nyudepthv2": nyu_singles,
    "kaggle-nyu": kaggle,
    "kitti": kitti,
    "kitti-list/train.txt": kitti_list,
    "tum": tum,
    "nyu-list": list_of_two,
    "table": table,
    "jsonl": jsonl,
    "parquet": parquet,
    "saved": saved,
    "patterns": pairs("scans/{scene}/left/{n}_a.png", "scans/{scene}/metres/{n}_b.exr", None, TRAIN),
}
# What a command needs beside --dataset.
OPTIONS = {
    "patterns": {"image_glob": "scans/*/left/*_a.png", "depth_glob": "scans/*/metres/*_b.exr"},
}
