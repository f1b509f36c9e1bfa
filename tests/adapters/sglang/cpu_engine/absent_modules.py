"""Empty stand-ins for packages that SGLang imports and that a Llama on a CPU never calls.

They stand in for GPU kernels (`triton`, `sgl_kernel`) and for readers of pictures, sound and files
that no test uses: gigabytes, and some have no build for a CPU at all. A package that is installed
is not replaced. Whatever is asked of such a module is there and does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ABSENT = {"torchvision", "torchaudio", "triton", "gguf", "IPython", "sgl_kernel", "soundfile"}


class Placeholder:
    """A function, constant or instance of an absent module; as a decorator it changes nothing."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and not options and isinstance(arguments[0], types.FunctionType):
            return arguments[0]
        return self

    def __getattr__(self, name: str) -> Placeholder:
        # Triton says by the lack of `get_current_target` that it has no driver here.
        if name == "get_current_target" or name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(name)

    def __getitem__(self, _: Any) -> Placeholder:
        return self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:
        return (object,)  # as the base of a class

    def __or__(self, _: Any) -> Placeholder:
        return self  # as a part of `X | None`

    __ror__ = __or__

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __lt__(self, _: Any) -> bool:
        return False  # as a version

    def __bool__(self) -> bool:
        return False


class PlaceholderClass(type):
    """A class of an absent module; its attributes are strings, as members of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class AbsentModule(types.ModuleType):
    """Has whatever is asked for: what begins like a class is one, all else is a `Placeholder`."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "0.0.0"
        if name.startswith("__"):
            raise AttributeError(name)
        if name.lstrip("_")[:1].isupper():
            body = {"__module__": self.__name__, "__init__": lambda self, *_, **__: None}
            return PlaceholderClass(name, (object,), body)
        return Placeholder(f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent packages and all modules below them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> AbsentModule:
        return AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def stand_in() -> None:
    """From now on the packages of `ABSENT` that are not installed can be imported."""
    sys.meta_path.append(Finder())  # last: what is installed is found before
