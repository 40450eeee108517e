"""Single files of packages whose `__init__` needs torchvision, which does not import beside the torch of the tests."""

import importlib.abc
import importlib.machinery
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


class _AnyName(type):
    """A class on which every name can be looked up, as tables of torchvision's enumerations are built at import."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Absent(metaclass=_AnyName):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("torchvision is not installed; this reference needs more of it than names")


class _TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `torchvision` and every module below it: each has any name, and none of them works."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec) -> types.ModuleType:
        def attribute(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return _AnyName(name, (_Absent,), {})

        module = types.ModuleType(spec.name)
        module.__getattr__ = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_package(name: str) -> types.ModuleType:
    """Imports a package (timm, open_clip) that asks for torchvision at import and for none of it in its models.

    Where torchvision is missing, names of it stand in during the import and are gone afterwards.

    Raises:
        ImportError: the package is not installed; names the requirements file that has it.
    """
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{name} is not installed; pip install --no-deps -r requirements-references.txt")
    # `import_without_init` may have left a bare package behind.
    if name in sys.modules and not hasattr(sys.modules[name], "__version__"):
        for module in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[module]
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    stub = _TorchvisionStub()
    sys.meta_path.append(stub)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(stub)
        for module in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
