"""The subcommands of ``pyinvolution``, one module each.

``make_data.py`` is the command make-data; the first line of its docstring is the command's help. A module has
``configure(parser)``, which adds the arguments, and ``main(options)``, which returns an exit status or None. It imports
what needs more than torch in ``main``. The training commands (fit, validate, predict) parse their own arguments.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

__all__ = ["find"]


def find() -> dict[str, Any]:
    """The modules by the names of their commands."""
    names = sorted(module.name for module in iter_modules(__path__))
    return {name.replace("_", "-"): import_module(f"{__name__}.{name}") for name in names}
