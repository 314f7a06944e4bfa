"""The child process that holds one model in OpenVINO, on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from rarefy.runtimes.child import Arrays, Input, serve


class OpenVino:
    """One ONNX or IR file, compiled for latency.

    exact: float32, but for what the file itself stores smaller; by itself the plugin rounds activations to 8
    bits before compressed weights, keys and values in its cache as well, and computes in bfloat16 where the
    processor is made for it.
    """

    def __init__(self, path: str, threads: int, exact: bool) -> None:
        core = openvino.Core()
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if exact:
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
                         "KV_CACHE_PRECISION": "f32"}
        self.request = core.compile_model(path, "CPU", settings).create_infer_request()
        model = self.request.get_compiled_model()
        self.version = f"openvino {openvino.__version__}"
        self.inputs = tuple(Input(each.any_name, each.element_type.to_string(),
                                  tuple(0 if size.is_dynamic else size.get_length()
                                        for size in each.partial_shape)) for each in model.inputs)
        self.outputs = [each.any_name for each in model.outputs]
        self.seen = 0

    def run(self, inputs: Arrays) -> Arrays:
        found = self.request.infer(dict(inputs))
        return {name: found[k] for k, name in enumerate(self.outputs)}

    def begin(self) -> None:
        """The states of no tokens."""
        self.request.reset_state()
        self.seen = 0

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some tokens after those before, whose keys and values are states of the model."""
        places = np.arange(self.seen, self.seen + len(tokens))
        self.seen += len(tokens)
        given = {"input_ids": tokens[None], "attention_mask": np.ones((1, self.seen), np.int64),
                 "position_ids": places[None], "beam_idx": np.zeros(1, np.int32)}
        found = self.request.infer({each.name: given[each.name] for each in self.inputs})
        logits: NDArray[np.float32] = found[0][0]
        return logits


if __name__ == "__main__":
    sys.exit(serve(OpenVino))
