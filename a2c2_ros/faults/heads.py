"""Tiny correction heads in ONNX that do as they are told: real files for the real runtime."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.heads.onnx_head import OUTPUT_NAME, input_shapes, save_graph

OPSET, IR_VERSION = 17, 8
SLOW_SIZE, SLOW_PRODUCTS = 1000, 10  # square matrices that are multiplied: 0.1 to 0.2 s on a core
RESIDUALS = {"good": 0.01, "nan": np.nan, "huge": 50.0, "low": -50.0, "slow": 0.01, "broken": 0.01}


def write_head(path: Path, behaviour: str, manifest: HeadManifest) -> Path:
    """Write a head for a robot without cameras in its head.

    Args:
        path: ONNX file.
        behaviour: ``good`` returns a small residual, ``nan`` and ``huge`` what they say, ``low`` a huge one below 0,
            ``slow`` takes long, ``broken`` fails at every run but the first ones on zeros.
        manifest: Must name no cameras, latent or language.

    Returns:
        The path.
    """
    size = len(manifest.action_names)
    constants = {"zero": np.float32(0.0), "value": np.float32(RESIDUALS[behaviour])}
    nodes = [
        helper.make_node("Mul", ["base_action", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "value"], ["constant"]),
    ]
    last = "constant"
    if behaviour == "slow":
        constants["square"] = np.array([SLOW_SIZE, SLOW_SIZE], np.int64)
        # ReduceMax of an input: the runtime cannot compute it beforehand.
        nodes.append(helper.make_node("ReduceMax", ["nothing"], ["scalar"], keepdims=0))
        nodes.append(helper.make_node("Expand", ["scalar", "square"], ["product0"]))
        for i in range(SLOW_PRODUCTS):
            nodes.append(helper.make_node("MatMul", [f"product{i}", f"product{i}"], [f"product{i + 1}"]))
        nodes.append(helper.make_node("ReduceMax", [f"product{SLOW_PRODUCTS}"], ["rest"], keepdims=0))
        nodes.append(helper.make_node("Add", [last, "rest"], ["slowly"]))
        last = "slowly"
    if behaviour == "broken":
        # Slot 0 of the feature (sin, cos) is (0, 1), zeros are never a slot: the index is wrong but while warming up.
        constants |= {"first": np.array([0], np.int64), "large": np.float32(1000.0)}
        nodes.append(helper.make_node("ReduceL2", ["time_feature"], ["length"], keepdims=0))
        nodes.append(helper.make_node("Mul", ["length", "large"], ["scaled"]))
        nodes.append(helper.make_node("Cast", ["scaled"], ["index"], to=TensorProto.INT64))
        nodes.append(helper.make_node("Gather", ["state", "index"], ["gathered"], axis=1))
        nodes.append(helper.make_node("Mul", ["gathered", "zero"], ["vanished"]))
        nodes.append(helper.make_node("Add", [last, "vanished"], ["gone"]))
        last = "gone"
    nodes.append(helper.make_node("Identity", [last], [OUTPUT_NAME]))
    types = {np.float32: TensorProto.FLOAT, np.uint8: TensorProto.UINT8}
    inputs = [
        helper.make_tensor_value_info(name, types[dtype], shape)
        for name, (shape, dtype) in input_shapes(manifest).items()
    ]
    output = helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, (1, size))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, behaviour, inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    save_graph(model, manifest, path)
    return path
