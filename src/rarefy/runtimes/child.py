"""What a child process does that holds one exported network in a runtime: run it, time it, weigh it.

Protocol: a request is a line of JSON on standard input, followed by as many raw bytes as its ``bytes`` field
says; an answer is the same on the standard output that the process was started with. Arrays travel as their
bytes, with name, type and shape in the header.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rarefy.runtimes.llamacpp_child import memory

Arrays = Mapping[str, NDArray[Any]]


class Input(NamedTuple):
    """An input as a file declares it. shape: 0 for an axis of any length."""

    name: str
    type: str
    shape: tuple[int, ...]


class Engine(Protocol):
    """One network in one runtime."""

    version: str
    inputs: tuple[Input, ...]

    def run(self, inputs: Arrays) -> Arrays: ...


class Decoder(Protocol):
    """What an engine can do besides when the network is a language model with a cache."""

    def begin(self) -> None:
        """Forget all tokens."""
        ...

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [new, vocabulary] of tokens [new] that follow those before."""
        ...


def packed(arrays: Arrays) -> tuple[list[dict[str, Any]], bytes]:
    """What the header says of arrays, and their bytes."""
    told = [{"name": name, "type": str(values.dtype), "shape": list(values.shape)}
            for name, values in arrays.items()]
    return told, b"".join(np.ascontiguousarray(values).tobytes() for values in arrays.values())


def unpacked(told: list[dict[str, Any]], payload: bytes) -> dict[str, NDArray[Any]]:
    """The arrays that ``packed`` packed."""
    found, start = {}, 0
    for each in told:
        kind = np.dtype(each["type"])
        count = int(np.prod(each["shape"], dtype=np.int64))
        found[each["name"]] = np.frombuffer(payload, kind, count, start).reshape(each["shape"])
        start += count * kind.itemsize
    return found


def answer(engine: Engine, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Serve one request."""
    match request["do"]:
        case "run":
            told, raw = packed(engine.run(unpacked(request["arrays"], payload)))
            return {"arrays": told}, raw
        case "latency":
            inputs, seconds = unpacked(request["arrays"], payload), []
            clock = time.process_time if request["own"] else time.perf_counter
            for _ in range(request["count"]):
                started = clock()
                engine.run(inputs)
                seconds.append(clock() - started)
            return {"seconds": seconds}, b""
        case "read":
            told, raw = packed({"logits": read(cast(Decoder, engine), request, payload)})
            return {"arrays": told}, raw
        case "write":
            return write(cast(Decoder, engine), unpacked(request["arrays"], payload)["tokens"],
                         request["count"]), b""
        case _:
            return dict(memory()), b""


def read(decoder: Decoder, request: dict[str, Any], payload: bytes) -> NDArray[np.float32]:
    """Logits at the positions ``at`` of a text that is read in pieces: those before each of ``cuts``, the
    rest."""
    tokens = unpacked(request["arrays"], payload)["tokens"]
    at, found, start = np.array(request["at"]), [], 0
    decoder.begin()
    for part in np.split(tokens, request["cuts"]):
        logits = decoder.step(part)
        found.append(logits[at[(at >= start) & (at < start + len(part))] - start])
        start += len(part)
    return np.concatenate(found)


def write(decoder: Decoder, tokens: NDArray[np.int64], count: int) -> dict[str, Any]:
    """``count`` likeliest tokens after a text, and the seconds that reading and each further step took."""
    written: list[int] = []
    seconds = []
    decoder.begin()
    given = tokens
    for _ in range(count):
        started = time.perf_counter()
        given = decoder.step(given)[-1:].argmax(-1)
        seconds.append(time.perf_counter() - started)
        written.append(int(given[0]))
    return {"written": written, "seconds": seconds}


def serve(opened: Callable[[str, int, bool], Engine]) -> int:
    """Answer until standard input ends. Arguments of the process: the file, how many threads, and whether to
    compute exactly (``exact``) or as the runtime would by itself (``fast``)."""
    path, threads, how = sys.argv[1:]
    private = os.dup(1)  # whatever the runtime prints must not mix with the answers
    os.dup2(2, 1)
    with os.fdopen(private, "wb") as answers:
        try:
            engine = opened(path, int(threads), how == "exact")
        except Exception as error:  # noqa: BLE001  every runtime has its own
            _send(answers, {"refused": _line(error)})
            return 1
        _send(answers, {"version": engine.version, "inputs": engine.inputs})
        for line in sys.stdin.buffer:
            request = json.loads(line)
            payload = sys.stdin.buffer.read(request.get("bytes", 0))
            try:
                _send(answers, *answer(engine, request, payload))
            except Exception as error:  # noqa: BLE001
                _send(answers, {"refused": _line(error)})
    return 0


def _send(answers: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    answers.write(json.dumps({**header, "bytes": len(payload)}).encode() + b"\n")
    answers.write(payload)
    answers.flush()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
