"""The build backend: scikit-build-core, after a look whether there is a torch to build with.

Without this, pip would resolve and download torch as a dependency first, some gigabytes, and only then fail to build.
"""

import sys

from find_torch import ADVICE, find_torch
from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403


def _require_torch() -> None:
    if find_torch() is None:
        sys.exit(ADVICE.format(where=f"{sys.executable} has none"))


def get_requires_for_build_wheel(config_settings=None):
    _require_torch()
    return build.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    _require_torch()
    return build.get_requires_for_build_editable(config_settings)
