"""The library door: any method on a loaded Hugging Face model, counted, without the command line.

    import dynact
    from dynact import Teal

    with dynact.attach(model, Teal(sparsity=0.5), calibration=texts):
        model.generate(**inputs)
    print(dynact.achieved(model))

Every method of the package `methods` can be imported from here by its class. Names are looked up when they are asked
for, so that `import dynact` takes no time.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynact.counts import Achieved
    from dynact.door import achieved, attach, fit
    from dynact.fits import Fit
    from harness.errors import ConfigError, UnsupportedError
    from harness.execution.method import Method

__all__ = ["Achieved", "ConfigError", "Fit", "Method", "UnsupportedError", "achieved", "attach", "fit"]

_PLACES = {
    "Achieved": "dynact.counts",
    "ConfigError": "harness.errors",
    "Fit": "dynact.fits",
    "Method": "harness.execution.method",
    "UnsupportedError": "harness.errors",
    "achieved": "dynact.door",
    "attach": "dynact.door",
    "fit": "dynact.door",
}


def _method_files() -> dict[str, str]:
    """Class name in small letters -> its file in methods/: "denseslice" is DenseSlice in dense_slice."""
    import methods

    return {found.name.replace("_", ""): found.name for found in pkgutil.iter_modules(methods.__path__)}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if not name.startswith("_") and name[0].isupper() and (file := _method_files().get(name.lower())):
        found = getattr(importlib.import_module(f"methods.{file}"), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module 'dynact' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The functions, and the class of every method."""
    found = set(__all__)
    for own, file in _method_files().items():
        names = vars(importlib.import_module(f"methods.{file}"))
        found |= {name for name in names if name[0].isupper() and name.lower() == own}
    return sorted(found)
