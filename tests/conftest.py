"""What every test shares: shapes checked at each call, one thread, and tiny models that were really trained.

``tiny_llama``, ``tiny_llama_wide`` and ``tiny_gemma3`` are folders in the layout of Hugging Face, with a
tokenizer: byte-level BPE with 512 tokens. Each is trained here on the Python language reference for a few
seconds, because noise compresses like nothing that people use: its rows all matter alike, and rounding
moves no answer. ``tiny_random(family)`` is an untrained one of any family. The folders are shared by all
tests and kept in pytest's cache until this file or the libraries change: copy before you damage one.
Networks that are no language models are in ``tiny_networks``.
"""

# ruff: noqa: E402  (the import hook must stand before what it watches)

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # workers of xdist share the cores; must be set before torch loads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# The floors that compute. Those above hand over protocols and callbacks, which cannot be checked at run time.
CHECKED = ("numerics", "core", "formats", "techniques", "models", "calibration", "measure", "export")
install_import_hook([f"rarefy.{floor}" for floor in CHECKED], "beartype.beartype")

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from standard import evidence, weight  # noqa: F401  (fixtures)
from tiny_networks import tiny_cnn, tiny_encoder, tiny_gru, tiny_lstm  # noqa: F401  (fixtures)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

VOCABULARY = 512
STEPS, BATCH, LENGTH, RATE = 120, 4, 128, 1e-2
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
           "pad_token_id": 2}
_GEMMA = {**_COMMON, "head_dim": 32, "query_pre_attn_scalar": 32, "num_attention_heads": 4,
          "num_key_value_heads": 1, "sliding_window": 64, "tie_word_embeddings": True}
TRAINED: dict[str, dict[str, Any]] = {
    # grouped-query attention, its own head; rows of 128 (blocks of 32 and 64 fit) and 256 (so do the K-types)
    "tiny_llama": {**_COMMON, "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
                   "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "tie_word_embeddings": False},
    # every row divisible by 256
    "tiny_llama_wide": {**_COMMON, "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
                        "tie_word_embeddings": False},
    # tied, sandwich norms of 1 + w, local and global attention, one key-value head; no row of 256
    "tiny_gemma3": {**_GEMMA, "model_type": "gemma3_text", "hidden_size": 128, "intermediate_size": 320,
                    "num_hidden_layers": 3,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
_SMALL = {**_COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
RANDOM: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "model_type": "llama", "tie_word_embeddings": False},
    "mistral": {**_SMALL, "model_type": "mistral", "sliding_window": 32, "tie_word_embeddings": False},
    "qwen2": {**_SMALL, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_SMALL, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "gemma2": {**_SMALL, "model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32,
               "sliding_window": 32},
    "gemma3": {**_SMALL, "model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32,
               "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_SMALL, "model_type": "phi3", "tie_word_embeddings": False},
    "smollm3": {**_SMALL, "model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 64, "n_layer": 2,
             "n_head": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}


# ---- fixtures ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``cached(name, make)``: the folder that ``make(folder)`` filled, once for all workers and runs."""
    versions = f"{torch.__version__} {transformers.__version__}"
    own = Path(__file__), Path(__file__).with_name("tiny_networks.py")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in own) + versions.encode()).hexdigest()[:16]
    cache = getattr(request.config, "cache", None)
    root = (tmp_path_factory.getbasetemp().parent if cache is None else cache.mkdir("tiny-models")) / key

    def get(name: str, make: Callable[[Path], None]) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=root) as staged:
                    made = Path(staged, name)
                    made.mkdir()
                    make(made)
                    shutil.move(made, folder)
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_tokenizer(cached: Callable[..., Path]) -> PreTrainedTokenizerBase:
    """The tokenizer of every tiny model: byte-level BPE, BOS 0, EOS 1, padding 2."""
    return PreTrainedTokenizerFast.from_pretrained(cached("tokenizer", _train_tokenizer))


@pytest.fixture(scope="session")
def tiny_trained(cached: Callable[..., Path],
                 tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Path]:
    """``tiny_trained(name)``: the folder of one of the trained models, for tests over all of ``TRAINED``."""
    return lambda name: cached(name, lambda folder: _train(folder, TRAINED[name], tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_llama(tiny_trained: Callable[[str], Path]) -> Path:
    """A trained Llama with its own head and grouped-query attention; float32."""
    return tiny_trained("tiny_llama")


@pytest.fixture(scope="session")
def tiny_llama_wide(tiny_trained: Callable[[str], Path]) -> Path:
    """A trained Llama all of whose rows are divisible by 256; float32."""
    return tiny_trained("tiny_llama_wide")


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_trained: Callable[[str], Path]) -> Path:
    """A trained Gemma 3 with a tied head; float32."""
    return tiny_trained("tiny_gemma3")


@pytest.fixture(scope="session")
def tiny_random(cached: Callable[..., Path],
                tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Path]:
    """``tiny_random(family)``: an untrained model of that family, norms and biases random as well."""
    return lambda family: cached(f"random-{family}",
                                 lambda folder: _randomize(folder, RANDOM[family], tiny_tokenizer))


# ---- making them ---------------------------------------------------------------------------------------


def _text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def _train_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<bos>", "<eos>", "<pad>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>",
                            pad_token="<pad>", model_max_length=512).save_pretrained(folder)


def _network(settings: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(**settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _train(folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Next-token prediction; ``training.json`` keeps the loss before and after.

    Muon on the matrices of the blocks, Adam on the rest: Adam alone needs three times the steps.
    """
    ids = tokenizer(_text(), add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # transformers initialises from the global generator
        network = _network(settings).train()
    matrices = [values for name, values in network.named_parameters()
                if values.ndim == 2 and "layers" in name]
    others = [values for values in network.parameters() if all(values is not each for each in matrices)]
    optimizers = (torch.optim.Muon(matrices, RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, RATE, betas=(0.9, 0.95), weight_decay=0.0))
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, RATE, total_steps=STEPS, pct_start=0.1,
                                                     cycle_momentum=False) for each in optimizers]
    losses = []
    for _ in range(STEPS):
        loss = _loss(network, _batch(ids, generator))
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        losses.append(float(loss.detach()))
    before, after = losses[0], sum(losses[-10:]) / 10
    assert after < 0.65 * before, f"the tiny model did not learn: loss {before:.2f} -> {after:.2f}"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"before": before, "after": after}))


def _batch(ids: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=generator)
    rows = torch.stack([ids[start:start + LENGTH] for start in starts.tolist()])
    return torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), rows], 1)


def _loss(network: Any, tokens: Tensor) -> Tensor:
    logits = network(input_ids=tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _randomize(folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    generator = torch.Generator().manual_seed(0)
    network = _network(settings)
    with torch.no_grad():
        for values in network.parameters():
            noise = torch.randn(values.shape, generator=generator)
            values.copy_(values + 0.1 * noise if values.ndim == 1 else 0.15 * noise)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
