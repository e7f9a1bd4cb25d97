"""The operators as functions of ONNX in the domain ``pyinvolution``; docs/onnx.md is the contract.

A model calls them by name. An engine that has a kernel of that name runs it; another engine runs the function's body,
which is standard operations:

    Y[n,c,p] = sum over taps k of  W[n,g(c),k,p] * X[n,c, stride*p + dilation*k - padding]

as one slice of the padded X, one multiplication and one addition for each tap, as in `ops.PLAIN`.
"""

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

_ELEMENT_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}
_END = torch.iinfo(torch.int64).max


class Configuration(NamedTuple):
    """What the body of a function depends on; sizes of tensors are free.

    Attributes:
        inputs: names of the operator's tensors.
        dtype: of the tensors.
    """

    inputs: tuple[str, ...]
    dtype: torch.dtype
    relu: bool
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


Configurations = dict[str, list[Configuration]]
"""Those of the calls in a model, by the name of the operator."""


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
    model.functions.extend(_function(name, configurations, opset) for name, configurations in found.items())
    if opset <= 20:  # Nothing here is newer, and ONNX Runtime 1.17 takes no newer one.
        model.ir_version = min(model.ir_version, 9)
    return model


def _calls(found: Configurations) -> dict[OpOverload, Callable[..., Tensor]]:
    """A table for ``ExportedProgram.run_decompositions`` that turns each operator into a call of its function.

    ``found`` receives the configurations; a call's attribute ``configuration`` is its place in the list.
    """

    def call_of(operator: OpOverload) -> Callable[..., Tensor]:
        name = operator._schema.name.partition("::")[2]

        def call(*arguments: Any) -> Tensor:
            given = {
                argument.name: value for argument, value in zip(operator._schema.arguments, arguments, strict=True)
            }
            tensors = {
                argument.name: given.pop(argument.name)
                for argument in operator._schema.arguments
                if "Tensor" in str(argument.type)
            }
            input = tensors["input"]
            shape = (*input.shape[:2], *_pixels(name, tensors, given))
            for weight in ("reduce_weight", "span_weight"):
                if weight in tensors:
                    tensors[weight] = tensors[weight].flatten(1)[:, :, None, None]
            _fill(tensors)
            if "kernel_size" not in given:
                given["kernel_size"] = tensors["weight"].shape[2:4]
            configuration = Configuration(
                tuple(tensors),
                input.dtype,
                bool(given.get("relu")),
                *(_pair(given[key]) for key in ("kernel_size", "stride", "padding", "dilation")),
            )
            known = found.setdefault(name, [])
            if configuration not in known:
                known.append(configuration)
            attributes: dict[str, Any] = {
                key: int(value) if key == "relu" else list(_pair(value)) for key, value in given.items()
            }
            attributes["configuration"] = known.index(configuration)
            return torch.onnx.ops.symbolic(
                f"{DOMAIN}::{name}",
                tuple(tensors.values()),
                attributes,
                dtype=input.dtype,
                shape=shape,
                version=VERSION,
            )

        return call

    return {operator: call_of(operator) for operator in ops.PLAIN}


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    rows, columns = values
    return int(rows), int(columns)


def _fill(tensors: dict[str, Tensor]) -> None:
    """Give each optional tensor that is absent the value that changes nothing, so that all calls are alike."""
    input = tensors["input"]
    sums = torch.float64 if input.dtype == torch.float64 else torch.float32
    values: dict[str, Callable[[], Tensor]] = {
        "reduce_bias": lambda: input.new_zeros(tensors["reduce_weight"].shape[0]),
        "span_bias": lambda: input.new_zeros(tensors["span_weight"].shape[0]),
        "scale": lambda: input.new_ones(input.shape[1], dtype=sums),
        "shift": lambda: input.new_zeros(input.shape[1], dtype=sums),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            tensors[name] = values[name]()


def _pixels(name: str, tensors: dict[str, Tensor], attributes: dict[str, Any]) -> Iterable[Any]:
    if name == "involution_layer2d":
        return map(ops.layer_output_size, tensors["input"].shape[2:], attributes["stride"])
    return tensors["weight" if name == "involution2d" else "reduced"].shape[-2:]


def _function(name: str, configurations: Sequence[Configuration], opset: int) -> onnx.FunctionProto:
    """The function of an operator.

    Where a model calls it in several configurations, a chain of If selects by a constant, which engines resolve when
    they load the model. (Overloads of a function would say the same, but up to version 1.26 ONNX Runtime takes the
    first one that it finds.)
    """
    attributes = ["kernel_size", "stride", "padding", "dilation", "configuration"]
    if name != "involution2d":
        attributes.append("relu")
    start = _Body(configurations[0], "")
    given = start.prepare()
    bodies = [_Body(configuration, f"c{number}_") for number, configuration in enumerate(configurations)]
    for body in bodies:
        body.write(given)
    nodes = bodies[-1].nodes
    for number in reversed(range(len(bodies) - 1)):
        nodes = _selection(number, bodies[number], nodes)
    return onnx.helper.make_function(
        DOMAIN,
        name,
        configurations[0].inputs,
        ["output"],
        [*start.nodes, *nodes],
        [onnx.helper.make_opsetid("", opset)],
        attributes,
    )


def _selection(number: int, body: "_Body", otherwise: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes that run a body where the attribute ``configuration`` is ``number``, and the other nodes elsewhere."""
    type_ = onnx.helper.make_tensor_type_proto(_ELEMENT_TYPES[body.configuration.dtype], None)
    result = onnx.helper.make_value_info("output", type_)
    branches = {
        key: onnx.helper.make_graph(nodes, f"{key}_{number}", [], [result])
        for key, nodes in (("then_branch", body.nodes), ("else_branch", otherwise))
    }
    names = [f"{kind}{number}" for kind in ("wanted", "this", "chosen")]
    wanted = onnx.helper.make_node("Constant", [], names[:1])
    wanted.attribute.append(
        onnx.AttributeProto(name="value_int", type=onnx.AttributeProto.INT, ref_attr_name="configuration")
    )
    return [
        wanted,
        onnx.helper.make_node("Constant", [], names[1:2], value_int=number),
        onnx.helper.make_node("Equal", names[:2], names[2:]),
        onnx.helper.make_node("If", names[2:], ["output"], **branches),
    ]


class _Body:
    """The nodes of a function. Values are names; sizes of tensors are read when the model runs."""

    def __init__(self, configuration: Configuration, prefix: str) -> None:
        self.configuration, self.prefix = configuration, prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[int, ...], str] = {}

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or of its outputs where there are several."""
        names = [f"{self.prefix}{len(self.nodes)}_{i}" for i in range(outputs)]
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

    @property
    def narrow(self) -> bool:
        """Whether sums are kept in another type than the tensors."""
        return self.configuration.dtype.itemsize == 2

    def prepare(self) -> dict[str, str]:
        """Names of the inputs in the type of sums, scale and shift to multiply an image with.

        What engines compute from constant inputs when they load a model is here, before a selection: ONNX Runtime 1.24
        to 1.26 do not load one that has it inside.
        """
        given = {name: name for name in self.configuration.inputs}
        for name in given:
            if name in ("scale", "shift"):
                given[name] = self.node("Unsqueeze", name, self.ints(1, 2))
            elif self.narrow:
                given[name] = self.node("Cast", name, to=onnx.TensorProto.FLOAT)
        return given

    def write(self, given: dict[str, str]) -> None:
        c = self.configuration
        given = dict(given)
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
        if "scale" in given:
            output = self.node("Add", self.node("Mul", output, given["scale"]), given["shift"])
        if c.relu:
            output = self.node("Relu", output)
        last = ("CastLike", [output, "input"]) if self.narrow else ("Identity", [output])
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
