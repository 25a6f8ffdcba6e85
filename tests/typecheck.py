"""The type checker that the import hook of `conftest.py` puts on every function."""

import collections.abc
from collections.abc import Callable
from functools import wraps
from typing import Any

import typeguard


def typechecked(function: Callable) -> Callable:
    """Check arguments and results, but not those of constructors of pytrees: JAX rebuilds them with
    leaves that are no arrays (shardings, flags, operands of differentiation rules).
    """
    checked = typeguard.typechecked(function)
    if function.__name__ != "__init__":
        return checked

    @wraps(function)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "_flax_dataclass", False):
            checked(self, *args, **kwargs)

    return constructed


def _check_callable(name: str, value: Any, *_: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable")


# typeguard takes parameters with defaults for missing ones: `tqdm.update(n=1)` would be refused.
typeguard.origin_type_checkers[collections.abc.Callable] = _check_callable
