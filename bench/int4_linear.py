# SPDX-License-Identifier: Apache-2.0
"""int4 linear at the layers of published models, from one row to 512.

Peers get the same 4-bit values in the order they like best, packed beforehand. The dense ones get the weights that the
4-bit values stand for, in 16 bits.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch
from harness import Call, Case, Curve, Inputs, main
from layers import FEW_ROWS, LAYERS, ROWS, dense, onednn, truth
from presets import Model

GROUP = 128


def make_inputs(layer: str, rows: int, dtype: torch.dtype, seed: int, device: str) -> Inputs:
    features, channels = LAYERS[layer]
    generator = torch.Generator(device).manual_seed(seed)
    return {
        "x": torch.randn(rows, channels, generator=generator, device=device).to(dtype),
        "qweight": torch.randint(256, (features, channels // 2), generator=generator, device=device, dtype=torch.uint8),
        "scales": (torch.rand(channels // GROUP, features, generator=generator, device=device) * 0.01 + 0.005).to(
            torch.bfloat16
        ),
    }


def unpacked(inputs: Inputs) -> torch.Tensor:
    """The stored values 0..15, [N, K]."""
    q = inputs["qweight"]
    return torch.stack([q & 15, q >> 4], 2).view(len(q), -1)


def weight(inputs: Inputs) -> torch.Tensor:
    scales = inputs["scales"].float().T.repeat_interleave(GROUP, 1)
    return (unpacked(inputs).float() - 8) * scales


def ours(mode: str, inputs: Inputs) -> Call:
    import torch_kernels

    x = inputs["x"]
    packed = torch_kernels.Int4Weight(inputs["qweight"], inputs["scales"], in_features=x.shape[1], group_size=GROUP)
    packed.pack()
    return lambda: torch_kernels.int4_linear(x, packed, mode=mode)


def torch_int4pack(inputs: Inputs) -> Call:
    """torch's own int4 product, which torchao's int4 weights run on."""
    x = inputs["x"]
    q = unpacked(inputs)
    scales = torch.stack([inputs["scales"], torch.zeros_like(inputs["scales"])], 2).to(x.dtype)
    if x.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)
    pairs = (q[:, ::2] << 4) | q[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def bitsandbytes(inputs: Inputs) -> Call:
    """4-bit codebook weights (NF4), quantised from the dense ones: close to our values, not the same."""
    import bitsandbytes.functional as bnb

    x = inputs["x"]
    packed, state = bnb.quantize_4bit(weight(inputs).to(x.dtype), blocksize=64, quant_type="nf4")
    return lambda: bnb.matmul_4bit(x, packed.t(), state) if len(x) > 1 else bnb.gemv_4bit(x, packed.t(), state=state)


def onnxruntime(mode: str, inputs: Inputs) -> Call:
    """ONNX Runtime's MatMulNBits: float32 activations; with level 4 it quantises them to int8."""
    import numpy as np
    import onnx
    import onnxruntime as runtime

    x = inputs["x"]
    features, channels = len(inputs["qweight"]), x.shape[1]
    blocks = inputs["qweight"].view(features, channels // GROUP, GROUP // 2).numpy()
    scales = inputs["scales"].float().T.contiguous().numpy().reshape(-1)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "blocks", "scales"],
        ["y"],
        domain="com.microsoft",
        K=channels,
        N=features,
        bits=4,
        block_size=GROUP,
        accuracy_level=4 if mode == "a8" else 0,
    )
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x), features])],
        [onnx.numpy_helper.from_array(blocks, "blocks"), onnx.numpy_helper.from_array(scales, "scales")],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = x.float().contiguous(), torch.empty(len(x), features)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.data_ptr())

    def call() -> torch.Tensor:
        assert x is not None  # bound by its address
        session.run_with_iobinding(binding)
        return y

    return call


def openvino(mode: str, inputs: Inputs) -> Call:
    """OpenVINO's fused int4 product; in the int8 mode it quantises activations in groups as long as the weight's."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    x = inputs["x"]
    features, channels = len(inputs["qweight"]), x.shape[1]
    packed = inputs["qweight"].numpy().copy()
    values = ov.Tensor(packed, [features, channels // GROUP, GROUP], ov.Type.u4)
    scales = inputs["scales"].T.contiguous().half().numpy()[:, :, None]
    parameter = ops.parameter(list(x.shape), np.float32)
    centred = ops.subtract(ops.convert(ops.constant(values), np.float16), ops.constant(np.float16(8)))
    dequantised = ops.reshape(ops.multiply(centred, ops.constant(scales)), [features, channels], False)
    product = ops.matmul(parameter, ops.convert(dequantised, np.float32), False, True)
    precision = "f32" if x.dtype == torch.float32 or mode == "a8" else "bf16"
    compiled = ov.Core().compile_model(
        ov.Model([product], [parameter]),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if mode == "a8" else 0,
        },
    )
    request, x = compiled.create_infer_request(), x.float().contiguous().numpy()

    def call() -> torch.Tensor:
        (result,) = request.infer([x], share_inputs=True, share_outputs=True).values()
        assert packed is not None  # the constant borrows its memory
        return torch.from_numpy(result)

    return call


def case(layer: str, rows: int, mode: str, dtype: torch.dtype, devices: tuple[str, ...] = ("cpu", "cuda")) -> Case:
    features, channels = LAYERS[layer]
    kind = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
    peers = {f"dense-{kind}": functools.partial(dense, weight, dtype)}
    if dtype == torch.bfloat16:
        peers["torch-int4pack"] = torch_int4pack
        if "cpu" in devices and not torch.cuda.is_available():
            peers["onednn"] = functools.partial(onednn, weight)
    optional = {
        "ort": ("onnxruntime", functools.partial(onnxruntime, mode)),
        "openvino": ("openvino", functools.partial(openvino, mode)),
        "bitsandbytes": ("bitsandbytes", bitsandbytes),
    }
    present = {name: peer for name, (package, peer) in optional.items() if importlib.util.find_spec(package)}
    weights = features * channels // 2 + features * channels // GROUP * 2
    return Case(
        name=f"{layer}-m{rows}-{mode}-{kind}",
        make_inputs=functools.partial(make_inputs, layer, rows, dtype),
        run=functools.partial(ours, mode),
        bytes=weights + rows * (channels + features) * dtype.itemsize,
        flops=2 * rows * features * channels,
        dtype=torch.int8 if mode == "a8" else dtype,
        peers=peers | present,
        slow_peers=frozenset(present),
        inexact_peers=frozenset({"bitsandbytes"}),
        truth=functools.partial(truth, weight),
        tolerance=3e-2 if mode == "a8" or dtype != torch.float32 else 1e-4,
        devices=devices,
        curve=Curve(f"{layer}, {mode}, {kind}", "rows of x", rows, f"dense-{kind}"),
    )


def cases() -> list[Case]:
    half, single = torch.bfloat16, torch.float32
    sweep = [
        case("llama2-7b-gate", rows, mode, dtype)
        for mode, dtype in (("exact", half), ("a8", half), ("exact", single))
        for rows in ROWS
    ]
    layers = [
        case(layer, rows, "exact", half)
        for layer in ("llama2-7b-down", "llama3-8b-gate", "llama3-8b-qkv", "llama2-70b-gate", "llama2-70b-down")
        for rows in (1, 16, 64)
    ]
    float16 = [case("llama2-7b-gate", rows, "exact", torch.float16) for rows in (1, 16, 64)]
    one_row = [case("llama2-7b-gate", 1, "fast", dtype) for dtype in (half, single)]
    falcon = [
        case(layer, rows, "exact", torch.float16, ("cuda",))
        for layer in ("falcon-180b-in", "falcon-180b-out")
        for rows in ROWS
    ]
    return sweep + layers + float16 + one_row + falcon


def preset(name: str, model: Model) -> list[Case]:
    return [case(f"{name}-{layer}", rows, "exact", torch.bfloat16) for layer in model.layers for rows in FEW_ROWS]


if __name__ == "__main__":
    sys.exit(main("int4_linear", cases()))
