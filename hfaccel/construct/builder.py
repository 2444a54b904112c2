"""A small vocabulary for writing graphs: values, constants, linear layers, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir
    import torch

    Shape = Sequence[int | str]

OPSET = 20
"""The newest in which onnxruntime opens rounded values that are reshaped: from 21 on its propagation of ``QuantizeLinear`` fails on them."""
CONTRIB = "com.microsoft"


class GraphBuilder:
    """Collects nodes in the order in which they compute.

    Args:
        hf_model: its parameters lend their names to the graph's constants.
    """

    def __init__(self, hf_model: torch.nn.Module) -> None:
        self._module_names: dict[int, str] = {id(module): name for name, module in hf_model.named_modules()}
        self._inputs: list[onnx_ir.Value] = []
        self._outputs: list[onnx_ir.Value] = []
        self._nodes: list[onnx_ir.Node] = []
        self._constants: dict[str, onnx_ir.Value] = {}

    def input(self, name: str, shape: Shape, *, floating: bool = False) -> onnx_ir.Value:
        """A graph input, int64 unless it is float32."""
        import onnx_ir

        kind = onnx_ir.DataType.FLOAT if floating else onnx_ir.DataType.INT64
        self._inputs.append(onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(kind)))
        return self._inputs[-1]

    def output(self, value: onnx_ir.Value, name: str, shape: Shape) -> None:
        """Make a float32 value a graph output."""
        import onnx_ir

        value.name, value.shape, value.type = name, onnx_ir.Shape(shape), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        self._outputs.append(value)

    def constant(self, name: str, array: Any) -> onnx_ir.Value:
        """A constant; one of the same name that was made before is taken again."""
        import onnx_ir

        if name not in self._constants:
            tensor = onnx_ir.tensor(np.array(array, order="C"), name=name)  # keeps scalars scalar
            shape = onnx_ir.Shape(list(tensor.shape.numpy()))
            self._constants[name] = onnx_ir.Value(
                name=name, const_value=tensor, shape=shape, type=onnx_ir.TensorType(tensor.dtype)
            )
        return self._constants[name]

    def integers(self, *values: int) -> onnx_ir.Value:
        """An int64 vector."""
        return self.constant(f"integers_{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def integer(self, value: int) -> onnx_ir.Value:
        """An int64 scalar."""
        return self.constant(f"integer_{value}", np.array(value, dtype=np.int64))

    def nodes(
        self, operator: str, *inputs: onnx_ir.Value | None, outputs: int = 1, name: str = "", domain: str = "", **attributes: Any
    ) -> Sequence[onnx_ir.Value]:
        """Add a node; its outputs."""
        import onnx_ir

        title = name or f"{operator}_{len(self._nodes)}"
        node = onnx_ir.node(operator, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs, name=title)
        for number, value in enumerate(node.outputs):
            value.name = f"{title}_output_{number}"
            if domain == CONTRIB:  # all float here, and no shape inference knows it
                value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        self._nodes.append(node)
        return node.outputs

    def node(self, operator: str, *inputs: onnx_ir.Value | None, name: str = "", **attributes: Any) -> onnx_ir.Value:
        """Add a node of the standard domain with one output."""
        return self.nodes(operator, *inputs, name=name, **attributes)[0]

    def name_of(self, module: torch.nn.Module) -> str:
        """Name of a module in the model."""
        return self._module_names[id(module)]

    def parameter(self, module: torch.nn.Module, name: str = "weight") -> onnx_ir.Value:
        """A parameter of a module, float32."""
        return self.constant(f"{self.name_of(module)}.{name}", _array(getattr(module, name)))

    def linear(self, value: onnx_ir.Value, *modules: Any) -> onnx_ir.Value:
        """One product for all given linear layers, their outputs side by side."""
        first = self.name_of(modules[0])
        name = first if len(modules) == 1 else f"{first}_and_{len(modules) - 1}"
        weight = np.concatenate([_array(module.weight) for module in modules]).T
        product = self.node("MatMul", value, self.constant(f"{name}.weight", weight), name=name)
        if all(module.bias is None for module in modules):
            return product
        biases = [
            _array(module.bias) if module.bias is not None else np.zeros(len(_array(module.weight)), dtype=np.float32)
            for module in modules
        ]
        return self.node("Add", product, self.constant(f"{name}.bias", np.concatenate(biases)), name=f"{name}.add")

    def layer_norm(self, value: onnx_ir.Value, module: Any) -> onnx_ir.Value:
        """``torch.nn.LayerNorm`` over the last axis."""
        scale, bias = self.parameter(module), self.parameter(module, "bias")
        return self.node("LayerNormalization", value, scale, bias, name=self.name_of(module), epsilon=float(module.eps), axis=-1)

    def rms_norm(self, value: onnx_ir.Value, scale: onnx_ir.Value, epsilon: float) -> onnx_ir.Value:
        """Root mean square norm over the last axis, in the operators that onnxruntime makes one of; ``RMSNormalization`` is of opset 23."""
        squares = self.node("Pow", value, self.constant("two", np.float32(2)))
        mean = self.node("ReduceMean", squares, self.integers(-1), keepdims=1)
        shifted = self.node("Add", mean, self.constant(f"epsilon_{epsilon}", np.float32(epsilon)))
        return self.node("Mul", self.node("Div", value, self.node("Sqrt", shifted)), scale)

    def activation(self, value: onnx_ir.Value, name: str) -> onnx_ir.Value:
        """An activation function by transformers' name.

        Raises:
            ExportError: it is none of those that are known here.
        """
        if name == "relu":
            return self.node("Relu", value)
        if name == "gelu":
            return self.node("Gelu", value, approximate="none")
        if name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            return self.node("Gelu", value, approximate="tanh")
        if name in ("swish", "silu"):
            return self.node("Mul", value, self.node("Sigmoid", value))
        raise ExportError(
            f"the activation function '{name}' is not known",
            where="export",
            hint="known: relu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, silu, swish",
        )

    def model(self) -> onnx_ir.Model:
        """All of it as a model."""
        import onnx_ir

        graph = onnx_ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": OPSET, CONTRIB: 1},
            name="encoder_decoder",
        )
        return onnx_ir.Model(graph, ir_version=10, producer_name="hfaccel")


def _array(parameter: Any) -> np.ndarray:
    array: np.ndarray = parameter.detach().float().numpy()
    return array
