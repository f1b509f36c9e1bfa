"""Methods of public base classes that were renamed: the old names work for one release more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping


def bridge_renamed(cls: type, renamed: Mapping[str, str]) -> None:
    """Call it from `__init_subclass__`. Where a subclass defines a method by its old name, the new
    one leads to it, with a DeprecationWarning; where it defines the new one, the old leads there,
    for whoever calls `super()` by it. `renamed`: new names by old ones."""
    own = vars(cls)
    for old, new in renamed.items():
        if new in own:
            if old not in own:
                setattr(cls, old, own[new])
        elif old in own:
            warnings.warn(
                f"{cls.__qualname__}.{old} is now called {new}: rename it, as the old name will go "
                "with the next release",
                DeprecationWarning,
                stacklevel=4,
            )
            setattr(cls, new, own[old])
