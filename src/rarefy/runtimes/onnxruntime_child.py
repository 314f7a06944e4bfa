"""The child process that holds one ONNX file in ONNX Runtime, on the CPU."""

from __future__ import annotations

import sys

import onnxruntime

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

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))


if __name__ == "__main__":
    sys.exit(serve(OnnxRuntime))
