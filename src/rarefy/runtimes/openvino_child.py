"""The child process that holds one model in OpenVINO, on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import openvino

from rarefy.runtimes.child import Arrays, Input, serve


class OpenVino:
    """One ONNX or IR file, compiled for latency.

    exact: float32, but for what the file itself stores smaller; by itself the plugin rounds activations to 8
    bits before compressed weights, and computes in bfloat16 where the processor is made for it.
    """

    def __init__(self, path: str, threads: int, exact: bool) -> None:
        core = openvino.Core()
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if exact:
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        self.request = core.compile_model(path, "CPU", settings).create_infer_request()
        model = self.request.get_compiled_model()
        self.version = f"openvino {openvino.__version__}"
        self.inputs = tuple(Input(each.any_name, each.element_type.to_string(),
                                  tuple(0 if size.is_dynamic else size.get_length()
                                        for size in each.partial_shape)) for each in model.inputs)
        self.outputs = [each.any_name for each in model.outputs]

    def run(self, inputs: Arrays) -> Arrays:
        found = self.request.infer(dict(inputs))
        return {name: found[k] for k, name in enumerate(self.outputs)}


if __name__ == "__main__":
    sys.exit(serve(OpenVino))
