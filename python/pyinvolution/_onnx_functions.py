"""The operators as functions of ONNX in the domain ``pyinvolution``; docs/onnx.md is the contract.

A model calls them by name. An engine that has a kernel of that name runs it; another engine runs the function's body,
which is standard operations:

    Y[n,c,p] = sum over taps k of  W[n,g(c),k,p] * X[n,c, stride*p + dilation*k - padding]

as one slice of the padded X, one multiplication and one addition for each tap, as in `ops.PLAIN`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram

from pyinvolution import ops

__all__ = ["DOMAIN", "translate"]

DOMAIN = "pyinvolution"
VERSION = 1
CONFIGURATIONS = 32
"""So many functions of an operator have a kernel (cpp/onnxruntime/operators.cpp)."""

_END = torch.iinfo(torch.int64).max


class Configuration(NamedTuple):
    """What the body of a function depends on; sizes of tensors are free.

    Attributes:
        inputs: names of the operator's tensors.
        absent: names of the optional ones that a call does not have.
        narrow: whether the tensors have 16 bits, so that sums are kept in another type.
    """

    inputs: tuple[str, ...]
    absent: frozenset[str]
    narrow: bool
    relu: bool
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


Configurations = dict[str, list[Configuration]]
"""Those of the calls in a model, by the name of the operator."""


def _function_name(operator: str, number: int) -> str:
    """The name of the function for the configuration at this place of the list.

    Overloads of one function would say the same, but ONNX Runtime 1.18 to 1.26 ignores them and runs the wrong body.
    """
    return operator if number == 0 else f"{operator}_{number + 1}"


def translate(program: ExportedProgram, opset: int, **options: Any) -> onnx.ModelProto:
    """A program in ONNX, its operators as calls of functions.

    Args:
        opset: version of ONNX's operations, 18 or newer.
        options: of `torch.onnx.export`.
    """
    found: Configurations = {}
    plain = program.run_decompositions(_calls(found))
    exported = torch.onnx.export(plain, (), opset_version=opset, dynamo=True, verbose=False, **options)
    assert exported is not None
    model = exported.model_proto
    for operator, configurations in found.items():
        if len(configurations) > CONFIGURATIONS:
            warnings.warn(
                f"the model calls {operator} in {len(configurations)} configurations, of which only the first "
                f"{CONFIGURATIONS} have a kernel in an engine",
                stacklevel=2,
            )
        model.functions.extend(
            _function(_function_name(operator, number), configuration, opset)
            for number, configuration in enumerate(configurations)
        )
    if opset <= 20:  # Nothing here is newer, and ONNX Runtime 1.17 takes no newer one.
        model.ir_version = min(model.ir_version, 9)
    return model


def _calls(found: Configurations) -> dict[OpOverload, Callable[..., Tensor]]:
    """A table for ``ExportedProgram.run_decompositions`` that turns each operator into a call of its function.

    There are none for borders that shift, upsampling and correlation, which become standard operations.

    ``found`` receives the configurations.
    """

    def call_of(operator: OpOverload) -> Callable[..., Tensor]:
        name = operator._schema.name.partition("::")[2]

        def call(*arguments: Any) -> Tensor:
            # What a call leaves out has its default.
            given: dict[str, Any] = {argument.name: argument.default_value for argument in operator._schema.arguments}
            given |= dict(zip(given, arguments, strict=False))
            if given.pop("border", 0) != 0 or max(given.pop("upsample", (1, 1))) != 1:
                return ops.PLAIN[operator](*arguments)
            tensors: dict[str, Any] = {
                argument.name: given.pop(argument.name)
                for argument in operator._schema.arguments
                if "Tensor" in str(argument.type)
            }
            input = tensors["input"]
            shape = (*input.shape[:2], *_pixels(name, tensors, given))
            for weight in ("reduce_weight", "span_weight"):
                if weight in tensors:
                    tensors[weight] = tensors[weight].flatten(1)[:, :, None, None]
            if "kernel_size" not in given:
                given["kernel_size"] = tensors["weight"].shape[2:4]
            configuration = Configuration(
                tuple(tensors),
                frozenset(key for key, tensor in tensors.items() if tensor is None),
                input.dtype.itemsize == 2,
                bool(given.get("relu")),
                *(_pair(given[key]) for key in ("kernel_size", "stride", "padding", "dilation")),
            )
            known = found.setdefault(name, [])
            if configuration not in known:
                known.append(configuration)
            attributes: dict[str, Any] = {
                key: int(value) if key == "relu" else list(_pair(value)) for key, value in given.items()
            }
            return torch.onnx.ops.symbolic(
                f"{DOMAIN}::{_function_name(name, known.index(configuration))}",
                tuple(tensors.values()),
                attributes,
                dtype=input.dtype,
                shape=shape,
                version=VERSION,
            )

        return call

    functions = (ops.involution2d, ops.span_involution2d, ops.involution_layer2d)
    return ops.PLAIN | {operator: call_of(operator) for operator in functions}


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    rows, columns = values
    return int(rows), int(columns)


def _pixels(name: str, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> Iterable[Any]:
    if name == "involution_layer2d":
        return map(ops.layer_output_size, tensors["input"].shape[2:], attributes["stride"])
    return tensors["weight" if name == "involution2d" else "reduced"].shape[-2:]


def _function(name: str, configuration: Configuration, opset: int) -> onnx.FunctionProto:
    attributes = ["kernel_size", "stride", "padding", "dilation"]
    if "weight" not in configuration.inputs:
        attributes.append("relu")
    body = _Body(configuration)
    body.write()
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_function(DOMAIN, name, configuration.inputs, ["output"], body.nodes, opsets, attributes)


class _Body:
    """The nodes of a function. Values are names; sizes of tensors are read when the model runs."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[int, ...], str] = {}

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or of its outputs where there are several."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def ints(self, *values: int) -> str:
        if values not in self.constants:
            # As a tensor: of value_ints, ONNX 1.16 and older lose the shape inside a function.
            tensor = onnx.numpy_helper.from_array(np.array(values, np.int64))
            self.constants[values] = self.node("Constant", value=tensor)
        return self.constants[values]

    def size(self, tensor: str, start: int, end: int | None = None) -> str:
        return self.node("Shape", tensor, start=start, **({} if end is None else {"end": end}))

    def reshape(self, tensor: str, *sizes: str) -> str:
        return self.node("Reshape", tensor, self.node("Concat", *sizes, axis=0), allowzero=1)

    def write(self) -> None:
        c = self.configuration
        # Names of the inputs, in the type of sums; "" where there is none.
        given = {name: "" if name in c.absent else name for name in c.inputs}
        if c.narrow:
            wide = {"", "scale", "shift"}  # which have that type already
            given = {
                name: value if value in wide else self.node("Cast", value, to=onnx.TensorProto.FLOAT)
                for name, value in given.items()
            }
        x, taps = given["input"], c.kernel_size[0] * c.kernel_size[1]
        begin: Sequence[int] = c.padding
        end: Sequence[int] = c.padding
        if "reduce_weight" in given:
            cells = x
            if max(c.stride) > 1:
                # Means of the pixels that are inside the image.
                cells = self.node(
                    "AveragePool", x, kernel_shape=c.stride, strides=c.stride, ceil_mode=1, count_include_pad=0
                )
            given["reduced"] = self.node("Relu", self.node("Conv", cells, given["reduce_weight"], given["reduce_bias"]))
            # As much end padding as gives an output pixel for every cell.
            end = [d * (k - 1) - p for d, k, p in zip(c.dilation, c.kernel_size, begin, strict=True)]
        batch, channels = self.size("input", 0, 1), self.size("input", 1, 2)
        if "weight" in given:
            weight, groups = given["weight"], self.size("weight", 1, 2)
            pixels = self.size("weight", 4)
        else:
            weight = self.node("Conv", given["reduced"], given["span_weight"], given["span_bias"])
            groups = self.node("Div", self.size("span_weight", 0, 1), self.ints(taps))
            pixels = self.size(given["reduced"], 2)
        weight = self.reshape(weight, batch, groups, self.ints(taps), pixels)
        output = self.reshape(self.sum_of_taps(x, weight, batch, groups, begin, end), batch, channels, pixels)
        if given.get("scale"):
            scale, shift = (self.node("Unsqueeze", given[name], self.ints(1, 2)) for name in ("scale", "shift"))
            output = self.node("Add", self.node("Mul", output, scale), shift)
        if c.relu:
            output = self.node("Relu", output)
        last = ("CastLike", [output, "input"]) if c.narrow else ("Identity", [output])
        self.nodes.append(onnx.helper.make_node(*last, ["output"]))

    def sum_of_taps(
        self, x: str, weight: str, batch: str, groups: str, begin: Sequence[int], end: Sequence[int]
    ) -> str:
        """The sum as (N, G, C/G, Ho, Wo) from X and W as (N, G, Kh * Kw, Ho, Wo)."""
        c = self.configuration
        if any((*begin, *end)):
            x = self.node("Pad", x, self.ints(0, 0, *begin, 0, 0, *end))
        per_group = self.node("Div", self.size("input", 1, 2), groups)
        x = self.reshape(x, batch, groups, per_group, self.size(x, 2))
        taps = c.kernel_size[0] * c.kernel_size[1]
        weights = self.node("Split", weight, outputs=taps, num_outputs=taps, axis=2) if taps > 1 else [weight]
        total = ""
        for row in range(c.kernel_size[0]):
            rows = self.shifted(x, 0, row)
            for column in range(c.kernel_size[1]):
                term = self.node("Mul", self.shifted(rows, 1, column), weights[row * c.kernel_size[1] + column])
                total = self.node("Add", total, term) if total else term
        return total

    def shifted(self, x: str, axis: int, tap: int) -> str:
        """The pixels along an axis of the image that a tap of the kernel meets; the last tap ends with the image."""
        c = self.configuration
        dilation, step = c.dilation[axis], c.stride[axis]
        last = -dilation * (c.kernel_size[axis] - 1 - tap) or _END
        if (dilation * tap, last, step) == (0, _END, 1):
            return x
        return self.node("Slice", x, self.ints(dilation * tap), self.ints(last), self.ints(3 + axis), self.ints(step))
