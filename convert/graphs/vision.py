"""The vision graph: FastViTHD and projector as standard ONNX operators, pixel_values -> image_features.

For one image size the graph has fixed shapes; for several it takes any size. The batch size is dynamic. Where the plan changes the type
between two stages, there is a Cast. In a narrow float type, the dense products of stage 4 have a Cast to FP32 before and a Cast back after
them, which asks for sums in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from fastvlm_edge.convert.fastvithd import HEAD_DIM, LAYER_NORM_EPS, FastViTHDConfig
from fastvlm_edge.convert.graphs.builder import GraphBuilder, element_type
from fastvlm_edge.convert.precision import FLOAT_TYPES, VISION_STAGES, PrecisionPlan, vision_stage
from fastvlm_edge.model_dir.manifest import visual_tokens


def build_vision(
    graph: GraphBuilder,
    config: FastViTHDConfig,
    hidden: int,
    image_size: int | None,
    plan: PrecisionPlan,
    activation_scales: Mapping[str, float] | None = None,
    integer_inputs: Collection[str] = (),
    *,
    fp32_scales: bool = False,
) -> None:
    """Add encoder and projector to `graph`, whose weights file holds what `write_vision_weights` wrote.

    Input: pixel_values [batch, 3, image_size, image_size], always float32, in 0..1. With `image_size` None, any multiple of 64.
    Output: image_features [batch, (image_size / 64)^2, hidden] in the decoder's float type.

    `activation_scales` (layer -> scale) is for GPUs: the inputs of these layers get `QuantizeLinear` and `DequantizeLinear` right before
    the Conv or MatMul, and TensorRT turns the three into one INT8 product. On a CPU that would only take time.
    `integer_inputs` is for CPUs: these layers have INT8 weights, and their inputs are quantised by the range of each picture at run time;
    onnxruntime turns that and the product into one kernel.
    With `fp32_scales` all scales are FP32 constants in the graph, and casts follow, for a TensorRT that refuses FP16 scales.
    """
    _Vision(graph, config, plan, activation_scales or {}, integer_inputs, fp32_scales=fp32_scales).build(hidden, image_size)


class _Vision:
    """Builds the graph from input to output; `dtype` is the type of the value that was added last."""

    def __init__(
        self,
        graph: GraphBuilder,
        config: FastViTHDConfig,
        plan: PrecisionPlan,
        activation_scales: Mapping[str, float],
        integer_inputs: Collection[str],
        *,
        fp32_scales: bool,
    ) -> None:
        self.graph = graph
        self.config = config
        self.plan = plan
        self.activation_scales = activation_scales
        self.integer_inputs = integer_inputs
        self.fp32_scales = fp32_scales
        self.dtype: np.dtype[np.generic] = np.dtype(np.float32)

    def build(self, hidden: int, image_size: int | None) -> None:
        graph, config = self.graph, self.config
        x = graph.input("pixel_values", self.dtype, ["batch", 3, image_size or "size", image_size or "size"])
        x = self._enter("stem", x)
        first = config.dims[0]
        x = self._gelu(self._conv(x, "vision.stem.0", "/stem.0", stride=2), "/stem.0")
        x = self._gelu(self._conv(x, "vision.stem.1", "/stem.1", stride=2, groups=first), "/stem.1")
        x = self._gelu(self._conv(x, "vision.stem.2", "/stem.2"), "/stem.2")
        for index, depth in enumerate(config.depths):
            x = self._enter(VISION_STAGES[index + 1], x)
            path, name, dim = f"/stages.{index}", f"vision.stages.{index}", config.dims[index]
            if index:
                narrow = config.dims[index - 1]
                x = self._conv(x, f"{name}.downsample.proj.0", f"{path}/downsample.0", stride=2, groups=narrow)
                x = self._gelu(x, f"{path}/downsample.0")
                x = self._gelu(self._conv(x, f"{name}.downsample.proj.1", f"{path}/downsample.1"), f"{path}/downsample.1")
            if index >= 3:
                x = self._conv(x, f"{name}.pos_emb", f"{path}/pos_emb", groups=dim)
            for block in range(depth):
                block_path, block_name = f"{path}/blocks.{block}", f"{name}.blocks.{block}"
                if index >= 3:
                    side = image_size // (4 << index) if image_size else None
                    mixed = self._attention(x, block_name, f"{block_path}/attn", dim, side)
                    x = graph.node("Add", [x, mixed], f"{block_path}/attn/residual")
                else:
                    x = self._conv(x, f"{block_name}.token_mixer", f"{block_path}/token_mixer", groups=dim)
                x = self._feed_forward(x, f"{block_name}.mlp", f"{block_path}/mlp", dim)
        x = self._enter("final_conv", x)
        x = self._conv(x, "vision.final_conv", "/final_conv", groups=config.dims[4])
        x = self._gelu(self._squeeze_excite(x), "/final_conv")

        x = self._enter("projector", x)
        x = graph.node("Reshape", [x, graph.ints(0, config.out_dim, -1)], "/projector/tokens")
        x = graph.node("Transpose", [x], "/projector/tokens", perm=[0, 2, 1])  # [batch, tokens, out_dim]
        x = self._gelu(self._linear(x, "projector.linear_1", "/projector/linear_1"), "/projector")
        x = self._linear(x, "projector.linear_2", "/projector/linear_2")
        dtype = np.dtype(FLOAT_TYPES[self.plan.decoder])
        x = self._cast(x, dtype, "/projector/features")
        graph.output("image_features", x, dtype, ["batch", visual_tokens(image_size) if image_size else "tokens", hidden])

    # Blocks ---------------------------------------------------------------------------------------------------------------------

    def _feed_forward(self, x: str, name: str, path: str, dim: int) -> str:
        """x + (depthwise 7 x 7, 1 x 1, GELU, 1 x 1); BatchNorm and layer scale are folded into the weights."""
        graph = self.graph
        y = self._conv(x, f"{name}.conv", f"{path}/conv", groups=dim)
        if f"{name}.fc1" not in self.integer_inputs:
            y = self._gelu(self._conv(y, f"{name}.fc1", f"{path}/fc1"), path)
            return graph.node("Add", [x, self._conv(y, f"{name}.fc2", f"{path}/fc2")], f"{path}/residual")
        # MatMulInteger needs the channels last. onnxruntime merges these Transposes with its own changes of layout around a Conv.
        x = graph.node("Transpose", [x], f"{path}/last", perm=[0, 2, 3, 1])
        y = graph.node("Transpose", [y], f"{path}/conv/last", perm=[0, 2, 3, 1])
        y = self._gelu(self._integer_product(y, f"{name}.fc1", f"{path}/fc1"), path)
        x = graph.node("Add", [x, self._integer_product(y, f"{name}.fc2", f"{path}/fc2")], f"{path}/residual")
        return graph.node("Transpose", [x], f"{path}/first", perm=[0, 3, 1, 2])

    def _attention(self, x: str, name: str, path: str, dim: int, side: int | None) -> str:
        """[batch, dim, side, side] -> [batch, dim, side, side]: norm, attention over all positions with heads of 32, projection."""
        graph, heads = self.graph, dim // HEAD_DIM
        shape = graph.ints(0, dim, side, side) if side else graph.node("Shape", [x], f"{path}/map")
        x = self._to_positions(x, path, dim)
        x = self._layer_norm(x, f"{name}.norm", f"{path}/norm")
        x = self._product(x, f"{name}.token_mixer.qkv", f"{path}/qkv")
        parts = graph.split("Split", [x, graph.ints(dim, dim, dim)], f"{path}/qkv", 3, axis=-1)
        split = [
            graph.node("Reshape", [part, graph.ints(0, 0, heads, HEAD_DIM)], f"{path}/{letter}")
            for part, letter in zip(parts, "qkv", strict=True)
        ]
        query = graph.node("Transpose", [split[0]], f"{path}/q", perm=[0, 2, 1, 3])  # [batch, heads, positions, 32]
        key = graph.node("Transpose", [split[1]], f"{path}/k", perm=[0, 2, 3, 1])
        value = graph.node("Transpose", [split[2]], f"{path}/v", perm=[0, 2, 1, 3])
        scores = graph.node("MatMul", [query, key], f"{path}/scores")
        weight = graph.node("Softmax", [scores], f"{path}/scores", axis=-1)
        x = graph.node("MatMul", [weight, value], f"{path}/sum")
        x = graph.node("Transpose", [x], f"{path}/heads", perm=[0, 2, 1, 3])
        x = graph.node("Reshape", [x, graph.ints(0, 0, dim)], f"{path}/heads")
        x = self._linear(x, f"{name}.token_mixer.proj", f"{path}/proj")
        return self._to_map(x, path, shape)

    def _to_positions(self, x: str, path: str, dim: int) -> str:
        """[batch, dim, height, width] -> [batch, positions, dim]"""
        x = self.graph.node("Reshape", [x, self.graph.ints(0, dim, -1)], f"{path}/positions")
        return self.graph.node("Transpose", [x], f"{path}/positions", perm=[0, 2, 1])

    def _to_map(self, x: str, path: str, shape: str) -> str:
        """[batch, positions, dim] -> `shape`, [batch, dim, side, side]"""
        x = self.graph.node("Transpose", [x], f"{path}/map", perm=[0, 2, 1])
        return self.graph.node("Reshape", [x, shape], f"{path}/map")

    def _squeeze_excite(self, x: str) -> str:
        """x times a gate per channel, which is computed from the mean over all positions."""
        graph, path, name = self.graph, "/final_conv/se", "vision.final_conv.se"
        gate = graph.node("ReduceMean", [x, graph.ints(2, 3)], path, keepdims=1)
        gate = graph.node("Relu", [self._conv(gate, f"{name}.fc1", f"{path}/fc1")], path)
        gate = graph.node("Sigmoid", [self._conv(gate, f"{name}.fc2", f"{path}/fc2")], path)
        return graph.node("Mul", [x, gate], path)

    # Operators ------------------------------------------------------------------------------------------------------------------

    def _conv(self, x: str, name: str, path: str, *, stride: int = 1, groups: int = 1) -> str:
        kernel = self.graph.shape(f"{name}.weight")[-1]
        weight, bias = self._weight(f"{name}.weight", path, axis=0), f"{name}.bias"
        if name in self.activation_scales:
            x = self._input(x, name, path)
        elif f"{name}.factor" in self.graph.weights.entries:  # applied to the weights, because they are fewer than the inputs
            weight = self.graph.node("Mul", [weight, self._weight(f"{name}.factor", path)], f"{path}/weight")
            bias = f"{name}.plain_bias"
        operands = [x, weight, self._weight(bias, path)]
        wide = groups == 1 and self._sums_in_fp32(name)
        x = self.graph.node(
            "Conv",
            self._widened(operands, path) if wide else operands,
            path,
            group=groups,
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
            strides=[stride, stride],
        )
        return self._narrowed(x, path) if wide else x

    def _product(self, x: str, name: str, path: str) -> str:
        if name in self.integer_inputs:
            return self._integer_product(x, name, path)
        if name in self.activation_scales:
            x = self._input(x, name, path)
        operands = [x, self._weight(f"{name}.weight", path, axis=1)]
        if self._sums_in_fp32(name):
            return self._narrowed(self.graph.node("MatMul", self._widened(operands, path), path), path)
        return self.graph.node("MatMul", operands, path)

    def _sums_in_fp32(self, name: str) -> bool:
        """Whether the sums of a dense product may exceed the type that it computes in: stage 4 has the largest activations below FP32."""
        return self.dtype != np.float32 and vision_stage(name) == "stage4"

    def _widened(self, operands: list[str], path: str) -> list[str]:
        """The operands of a product, cast to FP32 without a change of the current type."""
        names = ("input", "matrix", "bias")
        wide = element_type(np.float32)
        return [self.graph.node("Cast", [value], f"{path}/sums/{name}", to=wide) for value, name in zip(operands, names, strict=False)]

    def _narrowed(self, x: str, path: str) -> str:
        return self.graph.node("Cast", [x], f"{path}/sums", to=element_type(self.dtype))

    # DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by both scales -> Add; onnxruntime fuses them into one DynamicQuantizeMatMul
    def _integer_product(self, x: str, name: str, path: str) -> str:
        """INT8 product of x [..., inputs] and the weights of a 1 x 1 convolution or linear layer, plus the bias if it has one."""
        graph, entries = self.graph, self.graph.weights.entries
        weight, scale = graph.weight(f"{name}.weight"), graph.weight(f"{name}.weight.scale")
        if len(graph.shape(f"{name}.weight")) == 4:
            weight = graph.node("Reshape", [weight, graph.ints(0, -1)], f"{path}/weight")
            weight = graph.node("Transpose", [weight], f"{path}/weight", perm=[1, 0])
        if graph.dtype(f"{name}.weight.scale") != self.dtype:
            scale = graph.node("Cast", [scale], f"{path}/scale", to=element_type(self.dtype))
        if f"{name}.factor" in entries:
            factor, offset = (
                graph.node("Reshape", [self._weight(f"{name}.{part}", path), graph.ints(-1)], f"{path}/{part}")
                for part in ("factor", "offset")
            )
            x = graph.node("Add", [graph.node("Mul", [x, factor], f"{path}/input"), offset], f"{path}/input")
        integers, step, zero = graph.split("DynamicQuantizeLinear", [x], path, 3)
        x = graph.node("MatMulInteger", [integers, weight, zero], path)
        x = graph.node("Cast", [x], f"{path}/sum", to=element_type(np.float32))
        x = graph.node("Mul", [x, graph.node("Mul", [step, scale], f"{path}/scale")], path)
        if f"{name}.bias" not in entries:
            return x
        return graph.node("Add", [x, self._weight(f"{name}.bias", f"{path}/bias")], path)

    def _linear(self, x: str, name: str, path: str) -> str:
        x = self._product(x, name, path)
        if name in self.integer_inputs:
            return x  # the bias is already added
        return self.graph.node("Add", [x, self._weight(f"{name}.bias", f"{path}/bias")], path)

    def _gelu(self, x: str, path: str) -> str:
        """x * (1 + erf(x / sqrt(2))) / 2, in the form that onnxruntime and TensorRT fuse into one operator."""
        graph, path = self.graph, f"{path}/gelu"
        y = graph.node("Div", [x, graph.constant(math.sqrt(2), self.dtype)], path)
        y = graph.node("Add", [graph.node("Erf", [y], path), graph.constant(1, self.dtype)], path)
        y = graph.node("Mul", [x, y], path)
        return graph.node("Mul", [y, graph.constant(0.5, self.dtype)], f"{path}/half")

    def _layer_norm(self, x: str, name: str, path: str) -> str:
        """LayerNorm over the last axis, in FP32: in FP16 the squares of deviations above 256 would overflow silently.

        It is made of primitive operators, which onnxruntime fuses: the LayerNormalization importer of TensorRT 10.3 sets a precision, which
        is an error in strongly typed networks (docs/tensorrt-10.3.md).
        """
        graph, narrow, wide = self.graph, self.dtype, np.dtype(np.float32)
        x = self._cast(x, wide, f"{path}/wide")
        mean = graph.node("ReduceMean", [x, graph.ints(-1)], f"{path}/mean", keepdims=1)
        centred = graph.node("Sub", [x, mean], path)
        square = graph.node("Pow", [centred, graph.constant(2, wide)], path)
        variance = graph.node("ReduceMean", [square, graph.ints(-1)], f"{path}/variance", keepdims=1)
        variance = graph.node("Add", [variance, graph.constant(LAYER_NORM_EPS, wide)], f"{path}/variance")
        x = graph.node("Div", [centred, graph.node("Sqrt", [variance], path)], path)
        x = self._cast(x, narrow, f"{path}/narrow")
        scale, bias = (self._weight(f"{name}.{part}", path) for part in ("weight", "bias"))
        return graph.node("Add", [graph.node("Mul", [x, scale], path), bias], path)

    # x -> Mul by factor -> Add offset -> QuantizeLinear -> DequantizeLinear -> Conv or MatMul; the first two only if the layer has a factor
    def _input(self, x: str, name: str, path: str) -> str:
        """`x` through the quantisation of a layer's input."""
        graph, path = self.graph, f"{path}/input"
        if f"{name}.factor" in graph.weights.entries:
            factor, offset = (self._weight(f"{name}.{part}", path) for part in ("factor", "offset"))
            x = graph.node("Add", [graph.node("Mul", [x, factor], path), offset], path)
        narrow = self.dtype
        if self.fp32_scales:
            x = self._cast(x, np.dtype(np.float32), f"{path}/wide")
        scale, zero = graph.constant(self.activation_scales[name], self.dtype), graph.constant(0, np.int8)
        x = graph.node("QuantizeLinear", [x, scale, zero], path)
        x = graph.node("DequantizeLinear", [x, scale, zero], path)
        return self._cast(x, narrow, f"{path}/narrow")

    # Types ----------------------------------------------------------------------------------------------------------------------

    def _enter(self, stage: str, x: str) -> str:
        """Cast `x` to the type of `stage`, which becomes the current one."""
        return self._cast(x, np.dtype(FLOAT_TYPES[self.plan.vision[stage]]), f"/{stage}/enter")

    def _cast(self, x: str, dtype: np.dtype[np.generic], path: str) -> str:
        """Cast `x` from the current type to `dtype`, which becomes the current one."""
        if dtype == self.dtype:
            return x
        self.dtype = dtype
        return self.graph.node("Cast", [x], path, to=element_type(dtype))

    def _weight(self, name: str, path: str, axis: int = 0) -> str:
        """A weight as a float value of the current type; its outputs are along `axis`."""
        graph = self.graph
        if graph.is_quantized(name):
            return self._dequantized(name, path, axis) if self.fp32_scales else graph.dequantized(name, path, self.dtype, axis)
        if graph.dtype(name) == self.dtype:
            return graph.weight(name)
        return graph.node("Cast", [graph.weight(name)], f"{path}/{name.rpartition('.')[2]}", to=element_type(self.dtype))

    def _dequantized(self, name: str, path: str, axis: int) -> str:
        """An INT8 weight with FP32 scales, cast to the current type."""
        graph, wide = self.graph, np.dtype(np.float32)
        scale = graph.constant(graph.weights.read(f"{name}.scale"), wide)
        weight = graph.node("DequantizeLinear", [graph.weight(name), scale], path, axis=axis)
        return weight if self.dtype == wide else graph.node("Cast", [weight], f"{path}/weight/narrow", to=element_type(self.dtype))
