"""What this machine can run: processor, accelerators, runtimes with their versions, and what is missing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rarefy.measure.machine import joules
from rarefy.runtimes.llamacpp import usable_threads

# Instructions that decide how fast small integers are multiplied.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Runtime:
    """One place where exported models run. packages: version of each that it takes, "" where it is missing
    (of alternatives, the first is named). install: the line that brings what is missing, "" if nothing is."""

    name: str
    runs: str
    packages: dict[str, str]
    install: str
    devices: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether everything is there."""
        return not self.install


@dataclass(frozen=True)
class Machine:
    """memory: bytes; instructions: those for small integers; energy: whether its counter can be read."""

    processor: str
    threads: int
    memory: int
    instructions: tuple[str, ...]
    energy: bool


KNOWN = (
    ("llama.cpp", ".gguf files", ("xllamacpp|llama-cpp-python",), "pip install xllamacpp"),
    ("onnxruntime", ".onnx files, integers alone too", ("onnx", "onnxscript", "onnxruntime|onnxruntime-gpu"),
     "pip install 'rarefy[onnx]'"),
    ("openvino", ".xml files", ("onnx", "onnxscript", "openvino"), "pip install 'rarefy[openvino]'"),
    ("transformers", "compressed-tensors folders", ("transformers", "compressed-tensors"),
     "pip install 'rarefy[transformers]'"),
    ("peft", "low-rank repair, adapters", ("peft",), "pip install 'rarefy[transformers]'"),
    ("vllm", "compressed-tensors folders", ("vllm",), "pip install vllm"),
    ("torch", "native folders", ("torch",), "pip install torch"),
)


def runtimes() -> list[Runtime]:
    """Every runtime that files are written for, in the order of ``KNOWN``."""
    found = []
    for name, runs, packages, install in KNOWN:
        versions = dict(_version(package) for package in packages)
        ready = all(versions.values())
        found.append(Runtime(name, runs, versions, "" if ready else install, _devices(name) if ready else ()))
    return found


def _version(package: str) -> tuple[str, str]:
    """The first of the alternatives that is installed, and its version."""
    names = package.split("|")
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return names[0], ""


def _devices(name: str) -> tuple[str, ...]:
    """The devices that a runtime says it can use; a package that does not load has none."""
    try:
        match name:
            case "torch":
                import torch

                cards = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
                return ("cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else []))
            case "onnxruntime":
                import onnxruntime

                return tuple(each.removesuffix("ExecutionProvider").lower()
                             for each in onnxruntime.get_available_providers())
            case "openvino":
                import openvino

                return tuple(each.lower() for each in openvino.Core().available_devices)
            case _:
                return ()
    except (ImportError, OSError, RuntimeError) as error:
        return (f"does not load: {(str(error).splitlines() or [''])[0][:80]}",)


def machine() -> Machine:
    """The machine itself, as far as the system tells."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in told.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): text.strip() for key, text in lines.items()}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Machine(name, usable_threads(), pages,
                   tuple(each for each in INSTRUCTIONS if each in flags), joules() is not None)
