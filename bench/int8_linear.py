# SPDX-License-Identifier: Apache-2.0
"""int8 linear at the layers of published models: W8A8 with activations quantised in the call, LLM.int8() over the
number of outlier columns, and the transforms that prepare activations.

Peers get int8 weights packed beforehand. What depends on x, quantising it included, is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch
from harness import Call, Case, Curve, Inputs, main
from layers import FEW_ROWS, LAYERS, ROWS, dense, truth
from presets import Model

THRESHOLD = 6.0


def make_inputs(layer: str, rows: int, dtype: torch.dtype, outliers: int, seed: int, device: str) -> Inputs:
    features, channels = LAYERS[layer]
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator, device=device).clamp_(-5, 5)
    x[:, torch.randperm(channels, generator=generator, device=device)[:outliers]] += 20
    weight = torch.randint(-127, 128, (features, channels), generator=generator, device=device, dtype=torch.int8)
    return {"x": x.to(dtype), "weight": weight, "scale": torch.full((features,), 2e-4, device=device)}


def weight(inputs: Inputs) -> torch.Tensor:
    return inputs["weight"].float() * inputs["scale"][:, None]


def ours(threshold: float, inputs: Inputs) -> Call:
    import torch_kernels

    x, packed = inputs["x"], torch_kernels.Int8Weight(inputs["weight"], inputs["scale"])
    return lambda: torch_kernels.int8_linear(x, packed, threshold=threshold)


def int_mm(inputs: Inputs) -> Call:
    """torch._int_mm between eager quantisation and scaling: what torch offers in pieces."""
    x, w, scale = inputs["x"], inputs["weight"].t(), inputs["scale"]
    rows = max(len(x), 17) if x.device.type == "cuda" else len(x)  # CUDA's takes no fewer

    def call() -> torch.Tensor:
        row_scale = x.float().abs().amax(1, keepdim=True) / 127
        q = (x / row_scale).round().to(torch.int8)
        padded = torch.nn.functional.pad(q, (0, 0, 0, rows - len(x)))
        return (torch._int_mm(padded, w)[: len(x)].float() * row_scale * scale).to(x.dtype)

    return call


def linear_dynamic(inputs: Inputs) -> Call:
    """torch's dynamically quantised linear (oneDNN): one scale for all of x, float32."""
    torch.backends.quantized.engine = "onednn"
    w = torch._make_per_channel_quantized_tensor(
        inputs["weight"], inputs["scale"].double(), torch.zeros(len(inputs["scale"]), dtype=torch.long), 0
    )
    packed, x = torch.ops.quantized.linear_prepack(w, None), inputs["x"].float()
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def bitsandbytes(threshold: float, inputs: Inputs) -> Call:
    import bitsandbytes as bnb

    x = inputs["x"]
    features, channels = inputs["weight"].shape
    layer = bnb.nn.Linear8bitLt(channels, features, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(weight(inputs).half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(x.device)
    return lambda: layer(x)


def onnxruntime(inputs: Inputs) -> Call:
    """ONNX Runtime's DynamicQuantizeMatMul: one scale for all of x, float32."""
    import numpy as np
    import onnx
    import onnxruntime as runtime

    x, features = inputs["x"].float(), len(inputs["weight"])
    names = ["x", "weight", "scale", "zero"]
    node = onnx.helper.make_node("DynamicQuantizeMatMul", names, ["y"], domain="com.microsoft")
    constants = (inputs["weight"].t().contiguous(), inputs["scale"], torch.zeros(features, dtype=torch.int8))
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x), features])],
        [onnx.numpy_helper.from_array(t.numpy(), name) for t, name in zip(constants, names[1:], strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = torch.empty(len(x), features)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.data_ptr())

    def call() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def case(layer: str, rows: int, outliers: int | None = None) -> Case:
    """W8A8, or with a number of outlier columns LLM.int8()."""
    features, channels = LAYERS[layer]
    dtype = torch.bfloat16
    threshold = 0.0 if outliers is None else THRESHOLD
    peers = {"dense-bf16": functools.partial(dense, weight, dtype)}
    if outliers is None:
        curve = Curve(f"{layer}, W8A8", "rows of x", rows, "dense-bf16")
        peers["int-mm"] = int_mm
        if not torch.cuda.is_available():
            peers["linear-dynamic"] = linear_dynamic
            if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
                peers["ort"] = onnxruntime
    else:
        curve = Curve(f"{layer}, LLM.int8(), {rows} rows", "outlier columns", max(outliers, 0.5), "w8a8")
        peers["w8a8"] = functools.partial(ours, 0.0)
    if importlib.util.find_spec("bitsandbytes"):
        peers["bitsandbytes"] = functools.partial(bitsandbytes, threshold)
    return Case(
        name=f"{layer}-m{rows}" + ("" if outliers is None else f"-outliers{outliers}"),
        make_inputs=functools.partial(make_inputs, layer, rows, dtype, outliers or 0),
        run=functools.partial(ours, threshold),
        bytes=features * channels + 4 * features + rows * (channels + features) * dtype.itemsize,
        flops=2 * rows * features * channels,
        dtype=torch.int8,
        peers=peers,
        slow_peers=frozenset({"bitsandbytes", "ort"}),
        inexact_peers=frozenset({"w8a8", "linear-dynamic", "ort"}),  # outliers, or one scale for x, widen their steps
        truth=functools.partial(truth, weight),
        tolerance=3e-2,
        curve=curve,
    )


def transform_inputs(rows: int, columns: int, seed: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    return {"x": torch.randn(rows, columns, generator=generator, device=device).bfloat16()}


def transform(name: str, inputs: Inputs) -> Call:
    import torch_kernels

    x = inputs["x"]
    if name == "hadamard":
        return lambda: torch_kernels.hadamard_transform(x)
    if name == "rotate-quantize":
        return lambda: torch_kernels.rotate_quantize(x)[0]
    return lambda: torch_kernels.int8_quantize(x)[0]


def copy(inputs: Inputs) -> Call:
    x, out = inputs["x"], torch.empty_like(inputs["x"])
    return lambda: out.copy_(x)


def transform_case(name: str, rows: int, columns: int) -> Case:
    written = 2 if name == "hadamard" else 1
    return Case(
        name=f"{name}-{rows}x{columns}",
        make_inputs=functools.partial(transform_inputs, rows, columns),
        run=functools.partial(transform, name),
        bytes=rows * columns * (2 + written) + (0 if written == 2 else 4 * rows),
        flops=0,
        dtype=torch.bfloat16,
        peers={"copy": copy},
        inexact_peers=frozenset({"copy"}),
    )


def cases() -> list[Case]:
    sweep = [case("llama2-7b-gate", rows) for rows in ROWS]
    others = ("llama2-7b-down", "llama3-8b-gate", "llama2-70b-gate")
    layers = [case(layer, rows) for layer in others for rows in (1, 16, 64)]
    outliers = [case("llama2-7b-gate", rows, count) for rows in (1, 16) for count in (0, 1, 4, 16, 64, 256, 1024)]
    shapes = ((2048, 4096), (8192, 1024), (256, 32768), (2048, 10240))
    transforms = [
        transform_case(name, rows, columns)
        for name in ("hadamard", "rotate-quantize", "int8-quantize")
        for rows, columns in shapes
    ]
    return sweep + layers + outliers + transforms


def preset(name: str, model: Model) -> list[Case]:
    return [case(f"{name}-{layer}", rows) for layer in model.layers for rows in FEW_ROWS]


if __name__ == "__main__":
    sys.exit(main("int8_linear", cases()))
