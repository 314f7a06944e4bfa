"""One exported network held open in a child process: its answers, its latency, its memory.

A process of its own keeps the runtime's aborts, memory and threads apart from ours, and proves that the file
alone is enough: nothing of the network that it was made of is there.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.core.errors import TargetError
from rarefy.models.network import TENSOR
from rarefy.runtimes.child import Input, packed, unpacked
from rarefy.runtimes.llamacpp import Memory, usable_threads

TIMEOUT = 600.0
PIP = {"onnx": "pip install 'rarefy[onnx]'", "onnxscript": "pip install 'rarefy[onnx]'",
       "onnxruntime": "pip install 'rarefy[onnx]'", "openvino": "pip install 'rarefy[openvino]'",
       "compressed_tensors": "pip install 'rarefy[transformers]'",
       "peft": "pip install 'rarefy[transformers]'"}


def require(package: str) -> None:
    """A TargetError with the line that installs it, unless ``package`` is there. It is not imported."""
    if importlib.util.find_spec(package) is None:
        raise TargetError(f"{package} is not installed; {PIP[package]}")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median and 95th percentile of ``calls``."""

    median: float
    p95: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From the seconds of each call."""
        return cls(1000 * statistics.median(seconds), 1000 * float(np.quantile(seconds, 0.95)), len(seconds))


@dataclass(frozen=True)
class Written:
    """What a language model wrote. prefill: seconds until its first token; decode: of each further one."""

    tokens: tuple[int, ...]
    prefill: float
    decode: tuple[float, ...]


class Session:
    """One file (or folder) in one runtime: ``onnxruntime``, ``openvino`` or ``torch``. A context manager.

    exact: compute in the precision of the file, even where the runtime would round further by itself
    (OpenVINO: activations to 8 bits). version: what the runtime calls itself. inputs: names that the file
    gives its inputs; declared: with their types and shapes.
    """

    def __init__(self, path: Path | str, engine: str, *, threads: int | None = None, exact: bool = True,
                 timeout: float = TIMEOUT) -> None:
        require(engine)
        self.path, self.engine, self.timeout = Path(path), engine, timeout
        if not self.path.exists():
            raise TargetError(f"{self.path}: there is no such file to run in {engine}")
        self._overdue = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"rarefy.runtimes.{engine}_child", str(self.path.resolve()),
             str(threads or usable_threads()), "exact" if exact else "fast"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        try:
            header, _ = self._receive()
        except BaseException:
            self.close()
            raise
        self.version = str(header["version"])
        self.declared = tuple(Input(name, kind, tuple(shape)) for name, kind, shape in header["inputs"])
        self.inputs = tuple(each.name for each in self.declared)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        """The file's answers by name."""
        header, payload = self._ask("run", inputs)
        return unpacked(header["arrays"], payload)

    def answer(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first of the file's answers."""
        return torch.from_numpy(next(iter(self.run(inputs).values())).copy())

    def latency(self, inputs: Mapping[str, Tensor], count: int = 20, *, own: bool = False) -> list[float]:
        """Seconds of each of ``count`` calls in a row. own: of the processor, all threads together; with one
        thread that is the time on a machine that does nothing else."""
        return list(self._ask("latency", inputs, count=count, own=own)[0]["seconds"])

    def read(self, tokens: Tensor, at: Sequence[int], cuts: Sequence[int] = ()) -> Tensor:
        """Logits [at, vocabulary] of a language model at some positions, in order, of one text.

        cuts: where the text is cut into pieces that are read one after the other, through the cache.
        """
        header, payload = self._ask("read", {"tokens": tokens.reshape(-1)}, at=list(at), cuts=list(cuts))
        return torch.from_numpy(unpacked(header["arrays"], payload)["logits"].copy())

    def write(self, tokens: Tensor, count: int) -> Written:
        """The ``count`` likeliest tokens after a text, one after the other."""
        header, _ = self._ask("write", {"tokens": tokens.reshape(-1)}, count=count)
        return Written(tuple(header["written"]), header["seconds"][0], tuple(header["seconds"][1:]))

    def memory(self) -> Memory:
        """What the child process takes."""
        header, _ = self._ask("memory", {})
        return Memory(header["peak"], header["resident"], header["private"])

    def _ask(self, do: str, inputs: Mapping[str, Tensor], **more: Any) -> tuple[dict[str, Any], bytes]:
        arrays = {self.inputs[0] if name == TENSOR else name: values.detach().numpy()
                  for name, values in inputs.items()}
        told, raw = packed(arrays)
        assert self._process.stdin is not None
        try:
            request = {"do": do, "arrays": told, "bytes": len(raw), **more}
            self._process.stdin.write(json.dumps(request).encode() + b"\n" + raw)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._died() from None
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        """One answer, or TargetError when the child refuses, dies or stays silent for too long."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(self.timeout, self._expire)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
            header: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"died": True}
            payload = self._process.stdout.read(header.get("bytes", 0))
        finally:
            watchdog.cancel()
        if "died" in header or len(payload) < header["bytes"]:
            raise self._died()
        if "refused" in header:
            raise TargetError(f"{self.path}: {self.engine} refuses it: {header['refused']}")
        return header, payload

    def _expire(self) -> None:
        self._overdue = True
        self._process.kill()

    def _died(self) -> TargetError:
        where = f"{self.path}: {self.engine}"
        if self._overdue:
            return TargetError(f"{where} gave no answer within {self.timeout:g} seconds")
        if self._log.closed:
            return TargetError(f"{where}: the session is closed")
        code = self._process.wait()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        told = lines[-1].strip() if lines else "it said nothing"
        return TargetError(f"{where} crashed with {cause}: {told}")
