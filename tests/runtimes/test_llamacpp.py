"""llama.cpp in its child process: what it computes, what it measures, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarefy.core.errors import TargetError
from rarefy.export.gguf import export_gguf
from rarefy.models.model import open_model
from rarefy.runtimes import llamacpp
from rarefy.runtimes.llamacpp import Session, compare_speed, complete, distributions, runtime, speed

TEXT = "The for statement is used to iterate over the elements of a sequence. "


def exported(folder: Path, place: Path) -> Path:
    model, path = open_model(folder), place / "model.gguf"
    export_gguf(model, {}, {site.path: "F32" for site in model.map.sites}, path)
    return path


@pytest.fixture(scope="module")
def llama(tiny_random, tmp_path_factory):
    return exported(tiny_random("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def network(tiny_random):
    return AutoModelForCausalLM.from_pretrained(tiny_random("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_random):
    return AutoTokenizer.from_pretrained(tiny_random("llama"))


@pytest.fixture(scope="module")
def session(llama):
    with Session(llama, threads=1) as opened:
        yield opened


def test_whole_distributions_of_long_windows(session, network, tokenizer):
    """Longer than one batch of the runtime, so that the second attends to what the first left."""
    tokens = np.array([tokenizer(TEXT * 100)["input_ids"][:600]])
    with torch.no_grad():
        expected = network(torch.from_numpy(tokens)).logits.log_softmax(-1).numpy()
    found = np.stack(list(session.distributions(tokens)))
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.allclose(np.exp(found.astype(np.float64)).sum(-1), 1, atol=1e-5)
    assert (np.exp(expected) * (expected - found)).sum(-1).max() < 1e-4


def test_positions_are_rows_of_the_whole(session, tokenizer):
    tokens = np.array([tokenizer(TEXT)["input_ids"][:20], tokenizer(TEXT[::-1])["input_ids"][:20]])
    whole = list(session.distributions(tokens))
    some = list(session.distributions(tokens, [19, 3, 11]))
    for rows, all_rows in zip(some, whole, strict=True):
        assert np.abs(rows - all_rows[[19, 3, 11]]).max() < 1e-4


def test_greedy_completion(session, network, tokenizer):
    prompt = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = network.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1]:]
    found = session.complete(TEXT, 24)
    assert found and found == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(session.stream(TEXT, 24)) == found
    assert session.complete(TEXT, 5) == tokenizer.decode(expected[:5])


def test_a_stream_may_be_given_up(session):
    for _ in session.stream(TEXT, 400):
        break
    assert session.complete(TEXT, 3)


def test_tokens(session, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert session.tokenize(TEXT) == ids
    assert session.tokenize(TEXT, begin=False) == ids[1:]
    end = tokenizer.eos_token
    assert session.tokenize(end, begin=False, special=True) == [tokenizer.eos_token_id]
    assert len(session.tokenize(end, begin=False)) > 1
    session.check_tokens([TEXT], [ids])
    with pytest.raises(TargetError, match="at token 3; start from a GGUF of this model"):
        session.check_tokens([TEXT], [[*ids[:3], 511, *ids[4:]]])


def test_speed_and_memory(llama):
    rates, memory = speed(llama, prefill=64, decode=16, threads=1, repeats=1)
    assert rates.prefill > 0 and rates.decode > 0
    assert memory.peak >= memory.resident > memory.private > 1 << 20


def test_speeds_in_turns(llama):
    found = compare_speed(llama, llama, prefill=32, decode=16, threads=1, repeats=2)
    assert found.ratio_decode == found.b.decode / found.a.decode > 0
    assert found.ratio_prefill == found.b.prefill / found.a.prefill > 0
    assert found.drift >= 0 and found.memory_a.peak > 0 < found.memory_b.peak


def test_speed_stops_when_its_time_is_over(session):
    assert session.speed(prefill=512, decode=100_000, seconds=0.2).decode > 0


def test_functions_for_one_use(llama, session):
    tokens = np.array([[0, 5, 6]])
    once, again = next(distributions(llama, tokens, threads=1)), next(session.distributions(tokens))
    assert np.abs(once - again).max() == 0
    assert complete(llama, [TEXT, "x"], 4, threads=1) == [session.complete(text, 4) for text in (TEXT, "x")]


# ---- what it says when it cannot -----------------------------------------------------------------------


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(TargetError, match="there is no such file"):
        Session(tmp_path / "model.gguf")


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no GGUF at all" * 10)
    with pytest.raises(TargetError, match=r"refuses it: .*magic.*; export it again, or update") as caught:
        Session(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off(llama, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(llama.read_bytes()[:-4096])
    with pytest.raises(TargetError, match="corrupted or incomplete"):
        Session(path)


def test_a_token_outside_the_vocabulary(session):
    with pytest.raises(TargetError, match="token 512 is outside the file's vocabulary of 512"):
        list(session.distributions(np.array([[0, 512]])))
    assert session.complete(TEXT, 2)


def test_a_prompt_without_tokens(session):
    with pytest.raises(TargetError, match="prompt has no tokens"):
        session._one({"do": "generate", "prompt": [], "most": 4})


@pytest.mark.parametrize("positions", [[], [-1], [3], [1, 1]])
def test_positions_outside_the_window(session, positions):
    with pytest.raises(ValueError, match=r"distinct and lie in 0\.\.2"):
        next(session.distributions(np.array([[0, 1, 2]]), positions))


def test_a_crash_is_named(llama):
    with Session(llama, threads=1) as opened:
        assert opened._process is not None
        opened._process.kill()
        with pytest.raises(TargetError, match="crashed with SIGKILL"):
            opened.memory()
        assert opened.memory().peak > 0  # the next request starts another process


def test_silence_is_named(llama):
    with Session(llama, threads=1) as opened:
        opened.timeout = 0.05
        with pytest.raises(TargetError, match=r"no answer within 0\.05 seconds"):
            opened.speed(prefill=512, decode=100_000)


def test_nothing_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"pip install xllamacpp .*pip install llama-cpp-python"):
        runtime()


def fake_native_build(monkeypatch: pytest.MonkeyPatch, folder: Path, library: bytes | None) -> None:
    """A package of the name llama_cpp in front of everything else."""
    (folder / "llama_cpp" / "lib").mkdir(parents=True)
    (folder / "llama_cpp" / "__init__.py").touch()
    (folder / "llama_cpp_python-9.9.dist-info").mkdir()
    (folder / "llama_cpp_python-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n")
    if library is not None:
        (folder / "llama_cpp" / "lib" / "libllama.so").write_bytes(library)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()


def test_a_native_build_is_preferred_and_its_fault_named(monkeypatch, tmp_path, llama):
    fake_native_build(monkeypatch, tmp_path, b"not a library")
    assert str(runtime()) == "llama-cpp-python 9.9"
    with pytest.raises(TargetError, match=r"llama-cpp-python 9\.9.*libllama\.so does not load"):
        Session(llama)


def test_a_native_build_without_its_library(monkeypatch, tmp_path):
    fake_native_build(monkeypatch, tmp_path, None)
    with pytest.raises(TargetError, match=r"without its llama\.cpp library .*--force-reinstall llama"):
        runtime()


def test_a_library_of_another_kind(monkeypatch, llama):
    """One that loads and lacks llama.cpp's functions."""
    other = next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.so"))
    monkeypatch.setattr(llamacpp, "runtime", lambda: llamacpp.Runtime("another", "1", other))
    with pytest.raises(TargetError, match="does not export llama_backend_init"):
        Session(llama)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch, llama):
    """Threads that spin on a busy machine make everything many times slower."""
    def environment(opened):
        return Path(f"/proc/{opened._process.pid}/environ").read_bytes()

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with Session(llama, threads=1) as opened:
        assert b"GOMP_SPINCOUNT=1000" in environment(opened)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with Session(llama, threads=1) as opened:
        assert b"GOMP_SPINCOUNT" not in environment(opened)
