"""Packages that import torchvision, which does not import beside the torch of the tests."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


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
