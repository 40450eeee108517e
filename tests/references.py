"""Single files of packages whose `__init__` needs torchvision, which does not import beside the torch of the tests."""

import importlib
import importlib.util
import sys
import types


def import_without_init(name: str) -> types.ModuleType:
    """Imports a dotted module without running the `__init__` of the packages above it.

    Raises:
        ImportError: the package is not installed; names the requirements file that has it.
    """
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        package = ".".join(parents[:depth])
        if package in sys.modules:
            continue
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f"{package} is not installed; pip install --no-deps -r requirements-references.txt")
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
    return importlib.import_module(name)
