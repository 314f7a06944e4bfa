"""The child process that holds one GGUF file in llama.cpp and answers the parent's requests.

Two packages carry llama.cpp: ``llama-cpp-python`` (built on the user's machine, hence fast) and
``xllamacpp`` (a prebuilt wheel). Both export llama.cpp's own C functions, so one small binding serves
both, and it gives what neither Python interface does cheaply: the logits of every position of a window
from a single pass, where the server of xllamacpp takes a request and a sort of the vocabulary for each.
llama.cpp's parameter structs change from version to version; they are passed
through unread, as the library's own defaults, except for the context length, which opens its struct.

Protocol: requests are lines of JSON on standard input. An answer is a line of JSON on the standard
output that the process was started with, followed by as many raw bytes as its ``bytes`` field says.
A process of its own keeps the library's aborts, its memory and its logs apart from ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

LOGITS_BYTES = 128 << 20  # the library keeps one row of logits per requested position: ask in chunks
PROBE_TOKEN = 1  # speed does not depend on which token runs


class Refused(Exception):
    """What the parent reports to the user as a TargetError."""


class Parameters(ctypes.Structure):
    """A parameter struct passed by value without reading it: larger than any version's.

    All calling conventions in use pass a struct of this size in memory, where the callee reads as much
    as it knows.
    """

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """llama.cpp's ``llama_batch``."""

    _fields_ = [("n_tokens", ctypes.c_int32),
                ("token", ctypes.POINTER(ctypes.c_int32)),
                ("embd", ctypes.POINTER(ctypes.c_float)),
                ("pos", ctypes.POINTER(ctypes.c_int32)),
                ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
                ("logits", ctypes.POINTER(ctypes.c_int8))]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT, _FLAG, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_INTS, _FLOATS = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_print_system_info": (_TEXT, []),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, Parameters]),
    "llama_init_from_model": (_POINTER, [_POINTER, Parameters]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (_FLAG, [_POINTER, _INT]),
    "llama_tokenize": (_INT, [_POINTER, _TEXT, _INT, _INTS, _INT, _FLAG, _FLAG]),
    "llama_token_to_piece": (_INT, [_POINTER, _INT, _TEXT, _INT, _INT, _FLAG]),
    "llama_batch_init": (Batch, [_INT, _INT, _INT]),
    "llama_decode": (_INT, [_POINTER, Batch]),
    "llama_synchronize": (None, [_POINTER]),
    "llama_get_logits_ith": (_FLOATS, [_POINTER, _INT]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, _FLAG]),
}


def bind(library: str) -> ctypes.CDLL:
    """The library with the signatures above, or Refused naming what is wrong with it."""
    try:
        bound = ctypes.CDLL(library)
    except OSError as error:
        raise Refused(f"{library} does not load: {error}") from None
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(bound, name)
        except AttributeError:
            raise Refused(f"{library} does not export {name}: another version is needed") from None
        function.restype, function.argtypes = result, arguments
    opening = list(bound.llama_context_default_params().words[:4])
    if opening != [512, 2048, 512, 1]:
        raise Refused(f"{library}: the parameters of a context open with {opening}, not with "
                      "[512, 2048, 512, 1]: another version is needed")
    return bound


class Loaded:
    """One GGUF file in llama.cpp, and a context that grows with what is asked."""

    def __init__(self, library: str, path: str, threads: int) -> None:
        self.threads = threads
        self.errors: list[str] = []
        self.library = bind(library)
        self._log = _LOG(self._hear)
        self.library.llama_log_set(self._log, None)
        self.library.llama_backend_init()
        self.model = self.library.llama_model_load_from_file(
            path.encode(), self.library.llama_model_default_params())
        if not self.model:
            raise Refused(self._reason("it gave no reason"))
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.size = int(self.library.llama_vocab_n_tokens(self.vocabulary))
        self.context: int | None = None
        self.length = 0
        self.batch = self.library.llama_batch_init(512, 0, 1)

    def _hear(self, level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(text.decode(errors="replace").strip())

    def _reason(self, otherwise: str) -> str:
        """The most specific of the library's complaints: the last that is not a mere echo."""
        known = [line for line in self.errors if line and "_impl: failed" not in line]
        for prefix in ("llama_model_load: error loading model: ", "llama_model_loader: "):
            known = [line.removeprefix(prefix) for line in known]
        causes = [line for line in known if not line.startswith("failed to load model")]
        self.errors.clear()
        return (causes or known or [otherwise])[-1]

    def make_room(self, length: int) -> None:
        """An empty context of at least ``length`` tokens."""
        if self.context is None or self.length < length:
            if self.context is not None:
                self.library.llama_free(self.context)
            parameters = self.library.llama_context_default_params()
            parameters.words[0] = length
            self.context = self.library.llama_init_from_model(self.model, parameters)
            if not self.context or self.library.llama_n_ctx(self.context) < length:
                raise Refused(self._reason(f"no context of {length} tokens"))
            self.library.llama_set_n_threads(self.context, self.threads, self.threads)
            self.length = length
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def decode(self, tokens: Sequence[int], start: int, wanted: set[int]) -> None:
        """Run ``tokens`` (at most 512) at positions from ``start``; logits for offsets in ``wanted``."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for k, token in enumerate(tokens):
            if not 0 <= token < self.size:
                raise Refused(f"token {token} is outside the file's vocabulary of {self.size}")
            batch.token[k], batch.pos[k], batch.n_seq_id[k] = token, start + k, 1
            batch.seq_id[k][0], batch.logits[k] = 0, int(k in wanted)
        code = self.library.llama_decode(self.context, batch)
        if code:
            raise Refused(self._reason(f"decoding stopped with code {code}"))
        self.library.llama_synchronize(self.context)

    def logits(self, offset: int) -> NDArray[np.float32]:
        """A view of the logits at one wanted offset of the last batch."""
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, offset),
                                     (self.size,))

    def tokenize(self, text: str, begin: bool, special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        found = (ctypes.c_int32 * room)()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), found, room, begin, special)
        if count < 0:
            raise Refused(f"a text of {len(raw)} bytes did not tokenize")
        return list(found[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of one token; control tokens have none."""
        buffer = ctypes.create_string_buffer(512)
        count = self.library.llama_token_to_piece(self.vocabulary, token, buffer, 512, 0, False)
        return buffer.raw[:max(count, 0)]

    def prefill(self, tokens: Sequence[int]) -> int:
        """Run a prompt from an empty context; the offset of its last token in the last batch."""
        for start in range(0, len(tokens), 512):
            chunk = tokens[start:start + 512]
            last = start + len(chunk) == len(tokens)
            self.decode(chunk, start, {len(chunk) - 1} if last else set())
        return (len(tokens) - 1) % 512

    def window(self, tokens: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token after each of ``positions``, [positions, vocabulary]."""
        out = np.empty((len(positions), self.size), np.float32)
        row = {position: k for k, position in enumerate(positions)}
        step = max(16, min(512, LOGITS_BYTES // (4 * self.size)))
        self.make_room(len(tokens))
        for start in range(0, len(tokens), step):
            chunk = tokens[start:start + step]
            wanted = {k for k in range(len(chunk)) if start + k in row}
            self.decode(chunk, start, wanted)
            for k in sorted(wanted):
                logits = self.logits(k)
                top = logits.max()
                total = np.exp(logits - top).sum(dtype=np.float64)
                out[row[start + k]] = logits - (top + np.float32(np.log(total)))
        return out

    def generate(self, prompt: Sequence[int], most: int) -> Iterator[int]:
        """Greedy tokens after ``prompt`` until an end-of-generation token."""
        if not prompt:
            raise Refused("the prompt has no tokens")
        self.make_room(len(prompt) + most)
        offset = self.prefill(prompt)
        for k in range(most):
            token = int(self.logits(offset).argmax())
            if self.library.llama_vocab_is_eog(self.vocabulary, token):
                return
            yield token
            if k + 1 < most:
                self.decode([token], len(prompt) + k, {0})
                offset = 0

    def speed(self, prefill: int, decode: int, seconds: float) -> tuple[float, float]:
        """Tokens per second of one prompt and of the tokens after it, each in at most ``seconds``."""
        self.make_room(prefill + decode)
        started = time.perf_counter()
        done = 0
        while done < prefill and time.perf_counter() - started < seconds:
            chunk = [PROBE_TOKEN] * min(512, prefill - done)
            self.decode(chunk, done, {len(chunk) - 1})
            done += len(chunk)
        first = done / (time.perf_counter() - started)
        started = time.perf_counter()
        for k in range(decode):
            self.decode([PROBE_TOKEN], done + k, {0})
            if time.perf_counter() - started > seconds:
                break
        return first, (k + 1) / (time.perf_counter() - started)


def memory() -> dict[str, int]:
    """Bytes of this process: at its peak, now, and now without the mapped file."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage reports the parent's peak in a child made by vfork
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        kilobytes = {key: int(lines[key].split()[0]) for key in ("VmHWM", "VmRSS", "RssAnon")}
        return {"peak": kilobytes["VmHWM"] << 10, "resident": kilobytes["VmRSS"] << 10,
                "private": kilobytes["RssAnon"] << 10}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak": peak, "resident": peak, "private": peak}


def answer(loaded: Loaded, request: dict[str, Any], send: Callable[..., None]) -> None:
    """Serve one request; ``send(header, payload)`` may be called several times."""
    match request["do"]:
        case "distributions":
            positions = request["positions"]
            for tokens in request["tokens"]:
                table = loaded.window(tokens, positions)
                send({"shape": table.shape}, table.data.cast("B"))
        case "generate":
            for token in loaded.generate(request["prompt"], request["most"]):
                send({"token": token}, loaded.piece(token))
        case "tokenize":
            send({"tokens": loaded.tokenize(request["text"], request["begin"], request["special"])})
        case "speed":
            prefill, decode = loaded.speed(request["prefill"], request["decode"], request["seconds"])
            send({"prefill": prefill, "decode": decode})
        case "memory":
            send(memory())


def serve(library: str, path: str, threads: int, requests: BinaryIO, answers: BinaryIO) -> int:
    def send(header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        answers.write(json.dumps({**header, "bytes": len(payload)}).encode() + b"\n")
        answers.write(payload)
        answers.flush()

    try:
        loaded = Loaded(library, path, threads)
        send({"vocabulary": loaded.size,
              "system": (loaded.library.llama_print_system_info() or b"").decode(errors="replace")})
    except Refused as error:
        send({"refused": str(error)})
        return 1
    for line in requests:
        try:
            answer(loaded, json.loads(line), send)
            send({"done": True})
        except Refused as error:
            send({"refused": str(error)})
    return 0


def main() -> int:
    library, path, threads = sys.argv[1:]
    private = os.dup(1)  # whatever the library prints must not mix with the answers
    os.dup2(2, 1)
    with os.fdopen(private, "wb") as answers:
        return serve(library, path, int(threads), sys.stdin.buffer, answers)


if __name__ == "__main__":
    sys.exit(main())
