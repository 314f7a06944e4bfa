"""The child process that holds one ONNX file in ONNX Runtime, on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rarefy.runtimes.child import Arrays, Input, serve


class OnnxRuntime:
    """One file with all of the runtime's optimizations."""

    def __init__(self, path: str, threads: int, exact: bool) -> None:
        del exact  # it computes what the file says, always
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.inputs = tuple(Input(each.name, each.type.removeprefix("tensor(").removesuffix(")"),
                                  tuple(size if isinstance(size, int) else 0 for size in each.shape))
                            for each in self.session.get_inputs())
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.past: dict[str, Any] = {}
        self.seen = 0

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))

    def begin(self) -> None:
        """Keys and values of no tokens."""
        shapes = {each.name: (1, each.shape[1], 0, each.shape[3]) for each in self.inputs
                  if each.name.startswith("past_key_values.")}
        self.past = {name: _value(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
        self.seen = 0

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some tokens after those before; what attention keeps of them never leaves the runtime."""
        places = np.arange(self.seen, self.seen + len(tokens))
        self.seen += len(tokens)
        given = {"input_ids": tokens[None], "attention_mask": np.ones((1, self.seen), np.int64),
                 "position_ids": places[None]}
        feeds = {each.name: _value(given[each.name]) for each in self.inputs if each.name in given}
        logits, *present = self.session.run_with_ort_values(self.outputs, feeds | self.past)
        names = [name.replace("present.", "past_key_values.") for name in self.outputs[1:]]
        self.past = dict(zip(names, present, strict=True))
        found: NDArray[np.float32] = logits.numpy()[0]
        return found


def _value(values: NDArray[Any]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))


if __name__ == "__main__":
    sys.exit(serve(OnnxRuntime))
