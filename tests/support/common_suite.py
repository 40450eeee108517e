"""transformers' own common tests of models and backbones, which lie in its source distribution.

They are part of the source distribution alone, without the packages `exporters` and `generation` that they import;
what stands in for those is empty, so that only what needs them is left out.
"""

import importlib
import sys
import types
from pathlib import Path

import transformers

# Where `make` unpacks the tests of the installed release.
FOLDER = Path(sys.prefix) / "transformers-tests" / transformers.__version__
PACKAGE = "transformers_tests"
REPO = Path(__file__).resolve().parents[2]
# Modules that the source distribution lacks, and the class that is imported from each.
MISSING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def load(name: str) -> types.ModuleType:
    """A module of those tests."""
    if not (FOLDER / f"{name}.py").is_file():
        raise FileNotFoundError(f"expected transformers' tests in {FOLDER}; `make test` puts them there")
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        sys.modules[PACKAGE] = package
        for module, mixin in MISSING.items():
            parent, _, child = module.partition(".")
            sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(f"{PACKAGE}.{parent}")
            sys.modules[f"{PACKAGE}.{module}"] = stand_in = types.ModuleType(f"{PACKAGE}.{module}")
            setattr(stand_in, mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.{name}")
