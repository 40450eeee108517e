"""Small data sets of captioned pictures as people have them: 12 pictures to train on, 6 to judge, one colour each."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pandas
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

NUMBERS = {"train": range(12), "validation": range(12, 18)}
SHADES = 14  # between two neighbours, more than JPEG changes
# What breaks a careless reader of a csv: separators, quotes, a line break.
TRICKY = {1: 'a shade, of "1"', 2: "a shade;\nof 2", 3: 'a 3" shade | of 3'}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (24 + number, 32), (SHADES * number, 100, 50))


def number_of(rgb: Image.Image) -> int:
    """The number that a picture was made of."""
    return round(rgb.convert("RGB").getpixel((9, 9))[0] / SHADES)


def caption(number: int) -> str:
    return f"a shade of {number}"


def captions(number: int) -> list[str]:
    return [caption(number), f"the shade {number} again"]


def content(number: int, suffix: str) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, {"jpg": "jpeg"}.get(suffix, suffix))
    return file.getvalue()


def draw(folder: Path, split: str, suffix: str = "png", name: str = "{:03}") -> dict[int, Path]:
    """The pictures of a split as files: {number: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {number: folder / f"{name.format(number)}.{suffix}" for number in NUMBERS[split]}
    for number, path in paths.items():
        path.write_bytes(content(number, suffix))
    return paths


def write_csv(path: Path, rows: list[tuple], separator: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


# --- tables ---


def open_clip(folder: Path) -> None:
    """train.csv and val.csv with tabs between filepath and title, as open_clip reads them."""
    for split, table in (("train", "train.csv"), ("validation", "val.csv")):
        paths = draw(folder / "images", split, "jpg")
        rows = [(f"images/{path.name}", TRICKY.get(number, caption(number))) for number, path in paths.items()]
        write_csv(folder / table, [("filepath", "title"), *rows], "\t")


def semicolons(folder: Path) -> None:
    for split in NUMBERS:
        paths = draw(folder / "images", split)
        rows = [(TRICKY.get(number, caption(number)), path.name) for number, path in paths.items()]
        write_csv(folder / f"{split}.csv", [("caption", "image"), *rows], ";")


def cc3m(folder: Path) -> None:
    """Headerless, the caption first, and quotes that mean nothing."""
    for split, table in (("train", "Train_GCC-training.tsv"), ("validation", "Validation_GCC.tsv")):
        paths = draw(folder / split, split, "jpg")
        lines = [f"{TRICKY_LINES.get(number, caption(number))}\t{split}/{path.name}" for number, path in paths.items()]
        (folder / table).write_text("\n".join(lines) + "\n")


TRICKY_LINES = {4: '"a shade of 4', 5: 'a shade of "5"', 6: '"a" shade of 6'}


def flickr8k(folder: Path) -> None:
    """captions.txt of the copy on Kaggle: a row a caption."""
    rows = [("image", "caption")]
    for split in NUMBERS:
        paths = draw(folder / "Images", split, "jpg")
        rows += [(path.name, text) for number, path in paths.items() for text in captions(number)]
    write_csv(folder / "captions.txt", rows)


def flickr8k_tokens(folder: Path) -> None:
    lines = []
    for split in NUMBERS:
        paths = draw(folder / "Flicker8k_Dataset", split, "jpg")
        lines += [
            f"{path.name}#{n}\t{text}" for number, path in paths.items() for n, text in enumerate(captions(number))
        ]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))


def imagefolder(folder: Path) -> None:
    for split in NUMBERS:
        paths = draw(folder / split, split)
        rows = [(path.name, caption(number)) for number, path in paths.items()]
        write_csv(folder / split / "metadata.csv", [("file_name", "text"), *rows])


def imagefolder_jsonl(folder: Path) -> None:
    """Lists of captions, and tags."""
    for split in NUMBERS:
        paths = draw(folder / split, split)
        rows = [
            {"file_name": path.name, "text": captions(number), "tags": ["flat", "square"]}
            for number, path in paths.items()
        ]
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


# --- json ---


def coco_json(paths: dict[int, Path]) -> str:
    images = [{"id": 900 + number, "file_name": path.name, "width": 24, "height": 32} for number, path in paths.items()]
    entries = [(number, text) for place in (0, 1) for number in paths for text in captions(number)[place : place + 1]]
    annotations = [{"id": n, "image_id": 900 + number, "caption": text} for n, (number, text) in enumerate(entries)]
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


def coco(folder: Path) -> None:
    """With the boxes, which are not for this recipe."""
    (folder / "annotations").mkdir(parents=True)
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        paths = draw(folder / name, split, "jpg", "{:012}")
        (folder / "annotations" / f"captions_{name}.json").write_text(coco_json(paths))
        boxes = {"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1}]}
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(boxes))


def coco_alone(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(coco_json(draw(path.parent / "coco_pictures" / "train", "train", "jpg", "{:012}")))


def karpathy(folder: Path) -> None:
    images = []
    for split, own in (("train", ("train", "restval")), ("validation", ("val",))):
        paths = draw(folder / "val2014", split, "jpg", "COCO_val2014_{:012}")
        for number, path in paths.items():
            sentences = [{"raw": text, "tokens": text.split()} for text in captions(number)]
            entry = {"filepath": "val2014", "filename": path.name, "split": own[number % len(own)]}
            images.append({**entry, "sentences": sentences, "cocoid": number})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


# --- files beside files ---


def beside(suffix: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for split, name in (("train", "train"), ("validation", "val")):
            for number, path in draw(folder / name / "a", split).items():
                path.with_suffix(suffix).write_text("\n".join(captions(number)) + "\n")

    return write


# --- parquet, and what `datasets` saved ---


def parquet(kind: str) -> Callable[[Path], None]:
    """Pictures as paths, bytes, or {bytes, path}; train in two files, the first of two row groups."""

    cells = {
        "paths": lambda folder, split: [f"images/{path.name}" for path in draw(folder / "images", split).values()],
        "bytes": lambda folder, split: [content(number, "png") for number in NUMBERS[split]],
        "structs": lambda folder, split: [{"bytes": content(n, "webp"), "path": None} for n in NUMBERS[split]],
    }[kind]

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for split, numbers in NUMBERS.items():
            rows = pandas.DataFrame({"image": cells(folder, split), "caption": list(map(caption, numbers))})
            for shard, part in enumerate((rows[:8], rows[8:])):
                if len(part):
                    part.to_parquet(folder / f"{split}-{shard:05}-of-00002.parquet", row_group_size=4)

    return write


def saved(folder: Path) -> None:
    splits = {}
    for split, numbers in NUMBERS.items():
        rows = Dataset.from_dict({"image": list(map(picture, numbers)), "text": list(map(captions, numbers))})
        splits[split] = rows.cast_column("image", ImageFeature())
    DatasetDict(splits).save_to_disk(folder)


# --- tars ---


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """{key: {suffix: content}} -> a tar, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def shards(folder: Path) -> None:
    """Of jpg, png and webp, with a text of two lines each."""
    files = {"train-000.tar": range(6), "train-001.tar.gz": range(6, 12), "val-000.tar": range(12, 18)}
    for name, numbers in files.items():
        samples = {}
        for number in numbers:
            suffix = ("jpg", "png", "webp")[number % 3]
            samples[f"{number:06}"] = {suffix: content(number, suffix), "txt": "\n".join(captions(number)).encode()}
        write_tar(folder / name, samples)


def json_shards(folder: Path) -> None:
    """As img2dataset writes them, with tags and what is shown beside the caption."""
    for name, numbers in {"train/00000.tar": range(12), "validation/00000.tar": range(12, 18)}.items():
        samples = {}
        for number in numbers:
            about = {"caption": caption(number), "tags": ["flat", "square"], "thing": f"t{number}", "width": 24}
            samples[f"{number:09}"] = {"jpg": content(number, "jpg"), "json": json.dumps(about).encode()}
        write_tar(folder / name, samples)


# What `--dataset` names in docs/your-data.md -> writes it.
SETS: dict[str, Callable[[Path], None]] = {
    "open_clip": open_clip,
    "semicolons": semicolons,
    "cc3m": cc3m,
    "flickr8k": flickr8k,
    "flickr8k_tokens": flickr8k_tokens,
    "imagefolder": imagefolder,
    "imagefolder_jsonl": imagefolder_jsonl,
    "coco": coco,
    "captions_train2017.json": coco_alone,
    "karpathy": karpathy,
    "photos": beside(".txt"),
    "kohya": beside(".caption"),
    "parquet_paths": parquet("paths"),
    "parquet_bytes": parquet("bytes"),
    "parquet_structs": parquet("structs"),
    "saved": saved,
    "shards": shards,
    "json_shards": json_shards,
}
# Its flags, where it needs some.
FLAGS: dict[str, dict[str, str]] = {
    "captions_train2017.json": {"image_folder": "coco_pictures/train"},
    "imagefolder_jsonl": {"tag_column": "tags"},
    "json_shards": {"caption_column": "json.caption", "tag_column": "json.tags", "group_column": "json.thing"},
}
ONE_CAPTION = ("open_clip", "semicolons", "cc3m", "imagefolder", "json_shards")  # and parquet_...; the others have two
ONE_SPLIT = ("flickr8k", "flickr8k_tokens", "captions_train2017.json")


def expected(name: str) -> dict[str, list[tuple[int, list[str]]]]:
    """{split: [(number of the picture, its captions)]} of a set."""
    tricky = {"open_clip": TRICKY, "semicolons": TRICKY, "cc3m": TRICKY_LINES}.get(name, {})

    def row(number: int) -> tuple[int, list[str]]:
        is_single = name in ONE_CAPTION or name.startswith("parquet")
        return number, [tricky.get(number, caption(number))] if is_single else captions(number)

    if name == "captions_train2017.json":
        return {"train": list(map(row, NUMBERS["train"]))}
    splits = {"train": range(18)} if name in ONE_SPLIT else NUMBERS
    return {split: list(map(row, numbers)) for split, numbers in splits.items()}
