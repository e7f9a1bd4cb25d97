"""The build backend: scikit-build-core, with two things settled beforehand.

Without torch there is nothing to build with. pip would find out late, after it downloaded torch as a dependency (some
gigabytes), so the first question that it asks is answered with an error.

Editable installs rebuild at import, which an isolated build cannot promise: its build tools are gone by then.
"""

import sys
import sysconfig
from pathlib import Path

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


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    isolated = not Path(build.__file__).is_relative_to(sysconfig.get_path("purelib"))
    settings = {"editable.rebuild": "false"} if isolated else {}
    return build.build_editable(wheel_directory, settings | (config_settings or {}), metadata_directory)
