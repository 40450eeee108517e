"""embed_images and search against what people use: speed, equality of vectors, memory, recall.

    python benchmarks/bench_embed.py --part speed          # pictures a second, against what people use
    python benchmarks/bench_embed.py --part accuracy       # vectors of reduced decoding against those of whole pictures
    python benchmarks/bench_embed.py --part memory         # resident memory over a million rows
    python benchmarks/bench_embed.py --part search         # exact search against an index

Speed: a folder of JPEGs made from photos of scikit-image and scikit-learn, a ViT-B/32 CLIP of random weights, the same
batch, dtype and number of workers on all sides; each round runs every side, in turn. All need what `requirements.txt`
names; sentence-transformers, clip-retrieval and faiss take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from timing import Ratios, about, interleave, store, timed
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel

from vit_embed import VitEmbedForContrastive
from vit_embed.retrieval import search
from vit_embed.retrieval.embedder import Clock, PictureEmbedder, Read, Rows, load_embedder
from vit_embed.retrieval.local import embed_items
from vit_embed.retrieval.run import embed_into
from vit_embed.retrieval.sources import Item, Source, find_source
from vit_embed.retrieval.store import Store

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower", "motorcycle", "retina", "hubble_deep_field")
SIZES = {"12 megapixels": (4000, 3000), "640 x 480": (640, 480)}
BATCH = 32
# What tells a stored cell from another, and what takes part besides torch and transformers where it is installed.
CELL = ("size", "dtype")
PACKAGES = {"sentence-transformers": "sentence_transformers", "clip-retrieval": "clip_retrieval"}


def photos() -> list[Image.Image]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    from pictures import photo

    return [photo(name) for name in PHOTOS]


def write_pictures(folder: Path, size: tuple[int, int], count: int) -> None:
    """`count` JPEGs of photos, each another part of one, at a camera's size and quality."""
    chance = np.random.default_rng(0)
    sources = photos()
    for number in range(count):
        source = sources[number % len(sources)]
        left, top = (int(chance.integers(0, side // 4 + 1)) for side in source.size)
        part = source.crop((left, top, source.width * 3 // 4 + left, source.height * 3 // 4 + top))
        part.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=90)


def write_model(folder: Path) -> None:
    """A ViT-B/32 CLIP of random weights, readable by every side."""
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


# --- speed ---


class Files(torch.utils.data.Dataset):
    """What a plain recipe has: paths, opened and processed by the workers of a DataLoader."""

    def __init__(self, paths: list[Path], processor):
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> torch.Tensor:
        picture = Image.open(self.paths[place]).convert("RGB")
        return self.processor(picture, return_tensors="pt").pixel_values[0]


def transformers_side(model_folder: Path, folder: Path, dtype: torch.dtype, workers: int) -> Callable[[], torch.Tensor]:
    model = CLIPModel.from_pretrained(model_folder, dtype=dtype).eval()
    files = Files(sorted(folder.iterdir()), AutoImageProcessor.from_pretrained(model_folder))

    @torch.inference_mode()
    def run() -> torch.Tensor:
        loader = DataLoader(files, batch_size=BATCH, num_workers=workers)
        return torch.cat([_vectors(model.get_image_features(pixels.to(dtype))) for pixels in loader])

    return run


def _vectors(features) -> torch.Tensor:
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


def our_side(model_folder: Path, folder: Path, dtype: str, workers: int) -> Callable[[], torch.Tensor]:
    embedder = load_embedder(str(model_folder), dtype)
    source = find_source(str(folder))

    def run() -> torch.Tensor:
        rows = embed_items(embedder, source.items(), BATCH, workers)
        return torch.from_numpy(np.concatenate([batch.embeddings for batch in rows]))

    return run


def sentence_side(model_folder: Path, folder: Path, dtype: torch.dtype, scratch: Path) -> Callable[[], torch.Tensor]:
    """SentenceTransformer.encode over opened pictures, as its documentation shows, of a folder that we saved."""
    from sentence_transformers import SentenceTransformer

    VitEmbedForContrastive.from_pretrained(model_folder).save_pretrained(scratch)
    CLIPImageProcessor().save_pretrained(scratch)
    model = SentenceTransformer(str(scratch), trust_remote_code=True, model_kwargs={"dtype": dtype}, device="cpu")
    paths = sorted(folder.iterdir())

    def run() -> torch.Tensor:
        parts = [
            model.encode([Image.open(path).convert("RGB") for path in paths[start : start + BATCH]], batch_size=BATCH)
            for start in range(0, len(paths), BATCH)
        ]
        return torch.from_numpy(np.concatenate(parts))

    return run


def clip_retrieval_side(
    model_folder: Path, folder: Path, dtype: torch.dtype, workers: int
) -> Callable[[], torch.Tensor]:
    """clip-retrieval's own reader of files before the same model."""
    model = CLIPModel.from_pretrained(model_folder, dtype=dtype).eval()
    processor = AutoImageProcessor.from_pretrained(model_folder)
    reader = clip_retrieval_reader()

    def processed(picture: Image.Image) -> torch.Tensor:
        return processor(picture.convert("RGB"), return_tensors="pt").pixel_values[0]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        options = {"enable_text": False, "enable_image": True, "enable_metadata": False}
        dataset = reader.get_image_dataset()(processed, None, str(folder), **options)
        loader = reader.dataset_to_dataloader(dataset, BATCH, workers, "files")
        return torch.cat([_vectors(model.get_image_features(batch["image_tensor"].to(dtype))) for batch in loader])

    return run


def clip_retrieval_reader():
    """The module alone: the package imports its web server."""
    folder = Path(importlib.util.find_spec("clip_retrieval").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("clip_reader", folder / "clip_inference" / "reader.py")
    sys.modules["clip_reader"] = module = importlib.util.module_from_spec(spec)  # its workers are forks
    spec.loader.exec_module(module)
    return module


def measure_speed(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    print("| pictures | side | pictures a second | ratio to transformers | range |\n| --- | --- | --- | --- | --- |")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            model_folder, folder = Path(scratch) / "model", Path(scratch) / "pictures"
            folder.mkdir()
            write_model(model_folder)
            write_pictures(folder, SIZES[size], options.count)
            sides = {
                "transformers": transformers_side(model_folder, folder, dtype, options.workers),
                "vit_embed": our_side(model_folder, folder, options.dtype, options.workers),
            }
            installed = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module)]
            if "sentence-transformers" in installed:
                sides["sentence-transformers"] = sentence_side(model_folder, folder, dtype, Path(scratch) / "sentence")
            if "clip-retrieval" in installed:
                sides["clip-retrieval"] = clip_retrieval_side(model_folder, folder, dtype, options.workers)
            expected = sides["transformers"]()
            for name, run in sides.items():  # equal before fast
                cosines = (run() * expected).sum(1)
                assert cosines.min() > 0.99, (name, cosines.min())
            clock = time.perf_counter
            times = interleave(size, {name: timed(run, clock) for name, run in sides.items()}, options.rounds)
            for name, seconds in times.items():
                ratio, spread, _ = Ratios.of(times["transformers"], seconds).cells(2)
                figures = f"{options.count / statistics.median(seconds):.1f} | {ratio} | {spread}"
                print(f"| {options.count} of {size}, {options.dtype} | {name} | {figures} |", flush=True)
            if options.output:
                facts = {"size": size, "dtype": options.dtype, "count": options.count, "workers": options.workers}
                store(options.output, [{**facts, "seconds": times, "about": about("wall", installed)}], CELL)


# --- accuracy ---


def measure_accuracy(options: argparse.Namespace) -> None:
    """Cosine of the vector of a picture that was decoded smaller to that of the whole one, over every photo."""
    print("| model | photos | smallest cosine | median |\n| --- | --- | --- | --- |")
    for name in options.models:
        embedder = load_embedder(name, "float32")
        whole = PictureEmbedder(embedder.model, embedder.processor, reduced=False)
        for size in ("12 megapixels", "as they are, below one megapixel"):
            cosines = []
            for picture in photos():
                if size == "12 megapixels":
                    scale = (12e6 / (picture.width * picture.height)) ** 0.5
                    picture = picture.resize(
                        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
                    )
                elif picture.width * picture.height >= 1_000_000:
                    continue
                with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
                    picture.save(file.name, quality=95)
                    item = Item("a", "", file.name)
                    cosines.append(float(embedder([item]).embeddings[0] @ whole([item]).embeddings[0]))
            measured = f"{min(cosines):.6f} | {statistics.median(cosines):.6f}"
            print(f"| {Path(name).resolve().name} | {len(cosines)} of {size} | {measured} |", flush=True)


# --- memory ---


class Arithmetic:
    """An embedder that costs nothing, so that what is measured is the engine and the store."""

    clock = Clock()

    def read(self, item: Item) -> Read:
        return Read(item, np.zeros(0), 1, 1)

    def embed(self, read: list[Read]) -> Rows:
        return Rows(read, [], np.ones((len(read), 512), np.float32))


def measure_memory(options: argparse.Namespace) -> None:
    print("| what | rows | resident memory, MiB |\n| --- | --- | --- |")
    process = psutil.Process()

    def resident() -> str:
        return f"{process.memory_info().rss / 2**20:.0f}"

    print(f"| before | 0 | {resident()} |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "paths"
        for number in range(100_000):
            if number % 1000 == 0:
                (folder / f"{number // 1000:03d}").mkdir(parents=True)
            (folder / f"{number // 1000:03d}" / f"{number}.jpg").touch()
        listed = sum(1 for _ in find_source(str(folder)).items())
        print(f"| a folder of 100,000 paths listed | {listed:,} | {resident()} |", flush=True)
        for rows in (options.rows // 10, options.rows):

            def items(count: int = rows) -> Iterator[Item]:
                return (Item(f"photos/{number:09d}.jpg", "", b"") for number in range(count))

            store = Store(Path(scratch) / f"{rows}.parquet", {"input": "pictures", "weights": "none", "model": "none"})
            embed_into(store, Source(items, lambda count=rows: count), Arithmetic(), batch_size=1024, workers=1)
            print(f"| embedded into shards of 4096 | {rows:,} | {resident()} |", flush=True)
        embed_into(store, Source(items, lambda: rows), Arithmetic(), batch_size=1024, workers=1)
        print(f"| run again, all known | {rows:,} | {resident()} |")
    print(f"\nlargest: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


# --- search ---


def measure_search(options: argparse.Namespace) -> None:
    """Time of a query, exact and by the index, and how many of the ten nearest the index finds."""
    print(
        "| vectors | build, s | index, MiB | exact, ms | index, ms | recall@10 |\n| --- | --- | --- | --- | --- | --- |"
    )
    kinds = {"random": random_vectors}
    if options.vectors:
        kinds[f"of {Path(options.vectors).name}, with noise"] = noisy_vectors(options.vectors)
    for kind, make in kinds.items():
        for count in (10_000, 100_000, options.rows):
            embeddings = make(count)
            with tempfile.TemporaryDirectory() as scratch:
                vectors = search.Vectors(Path(scratch) / "v.parquet", [""] * count, embeddings, {})
                queries = torch.from_numpy(make(50, 1).astype(np.float32))
                start = time.perf_counter()
                file = search.build_index(vectors)
                build = time.perf_counter() - start
                index = search.index_of(vectors)
                exact_ms, exact = _queries(partial(_exact, embeddings), queries)
                index_ms, approximate = _queries(partial(_approximate, index), queries)
                recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, approximate)])
                print(
                    f"| {count:,} {kind} | {build:.1f} | {file.stat().st_size / 2**20:.0f} | {exact_ms:.1f} "
                    f"| {index_ms:.2f} | {recall:.3f} |",
                    flush=True,
                )


def _exact(embeddings: np.ndarray, query: torch.Tensor) -> np.ndarray:
    return search.nearest(embeddings, query, 10)[1][0].numpy()


def _approximate(index, query: torch.Tensor) -> np.ndarray:
    return index.search(query.numpy(), 10)[1][0]


def _queries(call: Callable[[torch.Tensor], np.ndarray], queries: torch.Tensor) -> tuple[float, list[np.ndarray]]:
    times, found = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(call(query[None]))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), found


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def random_vectors(count: int, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    parts = [
        _unit(chance.standard_normal((min(65_536, count - at), 512), np.float32)) for at in range(0, count, 65_536)
    ]
    return np.concatenate(parts)


def noisy_vectors(store: str) -> Callable[[int, int], np.ndarray]:
    """Vectors of a store, each drawn many times with noise of a third of its length: no store here has a million."""
    own = search.load_vectors(store).embeddings.astype(np.float32)

    def make(count: int, seed: int = 0) -> np.ndarray:
        chance = np.random.default_rng(seed)
        parts = []
        for at in range(0, count, 65_536):
            size = min(65_536, count - at)
            noise = chance.standard_normal((size, own.shape[1]), np.float32) / own.shape[1] ** 0.5 / 3
            parts.append(_unit(own[chance.integers(0, len(own), size)] + noise))
        return np.concatenate(parts)

    return make


PARTS = {"speed": measure_speed, "accuracy": measure_accuracy, "memory": measure_memory, "search": measure_search}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--count", type=int, default=200, help="speed: pictures (default 200)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="speed")
    parser.add_argument("--dtype", default="bfloat16", help="speed")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="speed: of every side that has them")
    parser.add_argument("--rounds", type=int, default=7, help="speed")
    parser.add_argument("--output", type=Path, help="speed: JSON that charts.py draws")
    parser.add_argument("--models", nargs="+", default=["."], help="accuracy: folders")
    parser.add_argument("--rows", type=int, default=1_000_000, help="memory, search: the largest number of rows")
    parser.add_argument("--vectors", help="search: real vectors, of embed_images")
    options = parser.parse_args(arguments)
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
