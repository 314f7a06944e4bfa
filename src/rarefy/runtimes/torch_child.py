"""The child process that holds one exported program (``.pt2``) in PyTorch: what the user has today."""

from __future__ import annotations

import sys
from typing import Any

import torch

from rarefy.runtimes.child import Arrays, serve


class Torch:
    """One program that ``torch.export`` saved."""

    def __init__(self, path: str, threads: int, exact: bool) -> None:
        del exact  # it computes what the file says, always
        torch.set_num_threads(threads)
        program: Any = torch.export.load(path)
        self.module = program.module()
        self.version = f"torch {torch.__version__}"
        specs = program.graph_signature.input_specs
        self.inputs = tuple(spec.arg.name for spec in specs if spec.target is None)

    def run(self, inputs: Arrays) -> Arrays:
        values = [torch.from_numpy(inputs[name].copy()) for name in self.inputs]
        with torch.inference_mode():
            found = self.module(*values)
        first = found if isinstance(found, torch.Tensor) else next(iter(
            found.values() if hasattr(found, "values") else found))
        return {"output": first.numpy()}


if __name__ == "__main__":
    sys.exit(serve(Torch))
