"""The kernels as custom operators of ONNX Runtime 1.17 and later, for files of ``pyinvolution export --custom-ops``.

::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(pyinvolution.onnxruntime.library_path())
    session = onnxruntime.InferenceSession("rednet50.onnx", options)

Neither this module nor the library needs torch. ``python -m pyinvolution.onnxruntime`` prints the path.
"""

from pyinvolution._native import folder

__all__ = ["library_path"]


def library_path() -> str:
    """The path of the library that ``SessionOptions.register_custom_ops_library`` takes.

    Raises:
        ImportError: the package's native libraries have not been built.
    """
    return str(folder() / "libpyinvolution_ort.so")


if __name__ == "__main__":
    print(library_path())
