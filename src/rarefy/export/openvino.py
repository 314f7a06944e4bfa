"""A network as OpenVINO's own files, with the codes of its trees as constants.

The graph is the one of ``export.onnx`` in standard operators, converted by OpenVINO itself. Weights arrive as

    Constant (i8, u8, i4 or u4) -> Convert -> Subtract -> Multiply -> Reshape -> MatMul

which its CPU plugin runs as one operator on the codes. It is checked that every constant of few bits is
there, bit for bit: a conversion that unfolded them would give a file four times as large, and no error. That
is what becomes of scales and factors in float16; they are put back, where float16 holds every number.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Target
from rarefy.export.onnx import GRIDS, Exported, OnnxSettings, export_onnx
from rarefy.export.pieces import OPERATOR
from rarefy.export.program import Program, Values
from rarefy.formats.onnx import onnx_package
from rarefy.numerics.ranges import Range

OPENVINO = Target("openvino", (*GRIDS, "F16", "F32", "tree"), ".xml",
                  description="IR files for OpenVINO: weights of 8 or 4 bits that its CPU plugin multiplies "
                              "as they are, 8-bit activations with static ranges")


def openvino_package() -> Any:
    """The ``openvino`` package, or a TargetError with the line that installs it."""
    try:
        import openvino
    except ImportError:
        raise TargetError("writing files for OpenVINO needs the package openvino; "
                          "pip install 'rarefy[openvino]'") from None
    return openvino


def export_openvino(module: nn.Module, trees: Mapping[str, Node], path: Path | str, *, inputs: Values,
                    settings: OnnxSettings | None = None, calibration: Sequence[Values] = (),
                    dynamic: tuple[int, ...] = (0,), params: Mapping[str, Tensor] | None = None,
                    program: Program | None = None, ranges: Mapping[str, Range] | None = None) -> Exported:
    """Write ``path`` (.xml) and the .bin beside it; arguments and result as of ``export_onnx``.

    settings: compute ``float`` or ``static``; OpenVINO rounds activations as they come by a setting of its
    own.
    """
    openvino, path, settings = openvino_package(), Path(path), settings or OnnxSettings()
    if settings.compute == "dynamic":
        raise TargetError("openvino has no operator for dynamic 8-bit activations; choose compute='static', "
                          "or 'float' and let the runtime round (its DYNAMIC_QUANTIZATION_GROUP_SIZE)")
    if path.suffix != ".xml":
        raise TargetError(f"{path}: an OpenVINO model is named .xml, with a .bin beside it")
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(module, trees, Path(folder) / "model.onnx", inputs=inputs, calibration=calibration,
                           settings=replace(settings, contrib=False), dynamic=dynamic, params=params,
                           program=program, ranges=ranges)
        model = openvino.convert_model(done.path)
        _check_codes(onnx_package().load(done.path), model, path)
        _halve(model)
        openvino.save_model(model, path, compress_to_fp16=False)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return replace(done, path=path, bytes=size)


def _halve(model: Any) -> None:
    """Constants of float32 in 16 bits, where no number changes by it and the file becomes smaller."""
    openvino = openvino_package()
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        values = np.asarray(node.data)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if half.nbytes <= OPERATOR or not np.array_equal(half, values):
            continue
        wide = openvino.opset13.convert(openvino.opset13.constant(half), "f32")
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(wide.output(0))


def _check_codes(proto: Any, model: Any, path: Path) -> None:
    """All codes of the ONNX graph are constants of the model, bit for bit."""
    kinds = onnx_package().TensorProto
    small = {kinds.INT8: "i8", kinds.UINT8: "u8", kinds.INT4: "i4", kinds.UINT4: "u4"}
    wanted = Counter((small[each.data_type], _bytes(each)) for each in proto.graph.initializer
                     if each.data_type in small and each.name.endswith(".codes"))
    found = Counter((node.get_element_type().get_type_name(), np.asarray(node.data).tobytes())
                    for node in model.get_ops() if node.get_type_name() == "Constant"
                    and node.get_element_type().get_type_name() in small.values())
    missing = wanted - found
    if missing:
        kind, data = next(iter(missing))
        raise TargetError(f"{path}: OpenVINO's conversion changed {missing.total()} of {wanted.total()} "
                          f"weights, the first of {len(data)} bytes in {kind}; update it: "
                          "pip install -U openvino")


def _bytes(values: Any) -> bytes:
    if values.raw_data:
        return bytes(values.raw_data)
    return np.asarray(onnx_package().numpy_helper.to_array(values)).tobytes()
