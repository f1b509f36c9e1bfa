"""The class that `use` names."""

from __future__ import annotations

from typing import Any

from tierloom.pipeline.config.problems import Findings, nearest
from tierloom.pipeline.config.tier_urls import refusal, scheme_of
from tierloom.pipeline.config.yaml_tree import Leaf, Table, shown
from tierloom.stages import catalog
from tierloom.stages.contract.stage import Stage
from tierloom.stages.tiers.contract.tier import Tier

_EXTRAS = {
    "cryptography": "crypto", "kvikio": "gds", "mooncake": "mooncake", "msgspec": "events",
    "nixl": "nixl", "obstore": "s3", "transformers": "hf", "zmq": "events",
}  # fmt: skip
"""Python modules, and the extra of ours that brings each."""
_OURS = {
    "anyio": "anyio", "lz4": "lz4", "numba": "numba", "numpy": "numpy", "rich": "rich",
    "torch": "torch", "triton": "triton", "typer": "typer", "xxhash": "xxhash",
    "yaml": "pyyaml", "zstandard": "zstandard",
}  # fmt: skip
"""Modules that tierloom imports, and the package of each."""


def installed_by(module: str) -> str:
    """A hint for a Python module that is missing: a module's name is often not its package's."""
    if module in _EXTRAS:
        return f"pip install 'tierloom[{_EXTRAS[module]}]'"
    if module in _OURS:
        return f"pip install {_OURS[module]}"
    return f"install the package that has the Python module {module!r}"


def class_of(
    kind: catalog.Kind, table: Table, path: str, found: Findings
) -> tuple[str, type[Any] | None]:
    """What `use` says, and its class, or None where that has a problem."""
    use = table.items.get("use")
    if not isinstance(use, Leaf) or not isinstance(use.value, str):
        known = nearest("", catalog.names(kind))
        if use is None:
            found.add(table.at, path, f"does not say which {kind} to use", known)
        else:
            found.add(use.at, f"{path}.use", f"wants the name of a {kind}, got {shown(use)}", known)
        return "", None
    name, base = use.value, Stage if kind == "stage" else Tier
    if scheme_of(name) is not None:
        found.add(use.at, path, *refusal(name))
        return name, None
    try:
        cls = catalog.load_class(kind, name)
    except KeyError:
        hint = nearest(name, catalog.names(kind))
        if kind == "tier" and name in catalog.SCHEMES.values():
            hint = f"it comes with an extra: pip install 'tierloom[{name}]'"
        found.add(use.at, path, f"no {kind} is called {name!r}", hint)
    except ImportError as e:
        missing = (e.name or "tierloom").split(".")[0]
        hint = "" if missing == "tierloom" else installed_by(missing)
        found.add(use.at, path, f"{kind} {name!r} cannot be loaded: {e}", hint)
    except Exception as e:  # a third party's module may raise anything while it is imported
        found.add(use.at, path, f"{kind} {name!r} cannot be loaded: {type(e).__name__}: {e}")
    else:
        if isinstance(cls, type) and issubclass(cls, base) and hasattr(cls, "Options"):
            return name, cls
        found.add(use.at, path, f"{name!r} is not a {kind}", f"a {kind} subclasses {base.__name__}")
    return name, None
