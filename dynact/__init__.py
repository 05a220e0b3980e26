"""The library door: any method on a loaded Hugging Face model, counted, without the command line.

    import dynact
    from dynact import Teal

    with dynact.attach(model, Teal(sparsity=0.5), calibration=texts):
        model.generate(**inputs)
    print(dynact.achieved(model))

Every method can be imported from here by its class. Names are looked up when they are asked
for, so that `import dynact` takes no time.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from harness.places import CONF

if TYPE_CHECKING:
    from dynact.counts import Achieved
    from dynact.door import achieved, attach, fit
    from dynact.fits import Fit
    from harness.errors import ConfigError, UnsupportedError
    from harness.execution.method import Method

__all__ = ["Achieved", "ConfigError", "Fit", "Method", "UnsupportedError", "achieved", "attach", "fit"]

_TARGET = re.compile(r"_target_: *(methods\.\w+)\.(\w+)")
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


def _methods() -> dict[str, str]:
    """Class of a method -> its module, as conf/method names them: the only list of methods that there is."""
    targets = (_TARGET.search(path.read_text()) for path in (CONF / "method").glob("*.yaml"))
    return {found[2]: found[1] for found in targets if found}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name[0].isupper() and name in (known := _methods()):
        return getattr(importlib.import_module(known[name]), name)
    raise AttributeError(f"module 'dynact' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The functions, and the class of every method."""
    return sorted({*__all__, *_methods()})
