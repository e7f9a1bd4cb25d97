"""The kernels as an extension of OpenVINO, for files of ``pyinvolution export --custom-ops``: docs/openvino.md.

The package has its source, since a library for OpenVINO fits one version of it. Neither this module nor what is built
from the source needs torch. ``python -m pyinvolution.openvino`` prints the folder.
"""

from pyinvolution._native import folder

__all__ = ["source_path"]


def source_path() -> str:
    """The folder with the CMakeLists.txt of the extension.

    Raises:
        ImportError: the package's native libraries have not been built.
    """
    return str(folder() / "share/pyinvolution/openvino")


if __name__ == "__main__":
    print(source_path())
