"""KL and agreement against plain double precision over the whole logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rarefy.calibration.text import PYTHON_DOCS, windows
from rarefy.core.errors import DataError, ModelError
from rarefy.core.nodes import Dense
from rarefy.measure import divergence
from rarefy.measure.divergence import (
    Agreement,
    Reference,
    Summary,
    clustered_error,
    compare_tables,
    log_probs,
)
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner


def changed(model: Model, size: float, seed: int = 0) -> dict[str, Tensor]:
    """Every matrix with relative noise, the head included."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in model.map.sites:
        weight = model.weight(site.path)
        found[site.path] = weight + size * weight.std() * torch.randn(weight.shape, generator=generator)
    return found


def plain(folder: Path, tokens: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Log-probabilities by transformers itself, in double precision."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, weight in (weights or {}).items():
            own = network.get_parameter(path)  # GPT-2 stores the matrices of its blocks [in, out]
            own.copy_(weight.T if path.startswith("transformer.h.") else weight)
        return network(input_ids=tokens).logits.double().log_softmax(-1)


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer: object) -> Tensor:
    return windows(PYTHON_DOCS, tiny_tokenizer, length=40, count=5, seed=0)


@pytest.mark.parametrize("tile", [1 << 23, 1 << 12])
def test_equals_the_definition(tile: int, tiny_llama: Path, tokens: Tensor,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the vocabulary and the positions go through in many tiles, the last ones narrower."""
    monkeypatch.setattr(divergence, "TILE", tile)
    monkeypatch.setattr(divergence, "CACHED", tile // 4)
    model = open_model(tiny_llama)
    weights = changed(model, 0.2)
    found = Reference(model, tokens).positions(Runner(model, weights.get))
    p, q = plain(tiny_llama, tokens), plain(tiny_llama, tokens, weights)
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found.kl.double(), kl.flatten(), atol=2e-5, rtol=1e-4)
    assert torch.equal(found.same, (p.argmax(-1) == q.argmax(-1)).flatten())
    for loss, logs in ((found.loss_original, p), (found.loss, q)):
        loss = loss.view(5, 40)
        assert bool(loss[:, -1].isnan().all())
        wanted = -logs[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(loss[:, :-1].double(), wanted, atol=2e-5, rtol=1e-4)


def test_summary(tiny_gemma3: Path, tokens: Tensor) -> None:
    model = open_model(tiny_gemma3)
    weights = changed(model, 0.1)
    reference = Reference(model, tokens)
    found = reference.compare(Runner(model, weights.get))
    kl = reference.positions(Runner(model, weights.get)).kl.view(5, 40)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_stderr == pytest.approx(float(kl.mean(1).std() / math.sqrt(5)), rel=1e-4)
    assert found.kl_median < found.kl_p999 and found.tokens == 200 and found.windows == 5
    assert found.perplexity > found.perplexity_original > 1
    assert Summary(**json.loads(json.dumps(asdict(found), allow_nan=False))) == found


def test_more_noise_is_further_away(tiny_gemma3: Path, tokens: Tensor) -> None:
    model = open_model(tiny_gemma3)
    reference = Reference(model, tokens)
    found = [reference.compare(Runner(model, changed(model, size).get)) for size in (0.0, 0.03, 0.1, 0.3)]
    assert found[0].kl_mean == found[0].kl_p999 == 0.0 and found[0].top1 == 1.0
    assert [each.kl_mean for each in found] == sorted(each.kl_mean for each in found)
    assert found[0].top1 > found[1].top1 > found[3].top1


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen2"])
def test_soft_caps_tied_and_transposed(family: str, tiny_random: Callable[[str], Path],
                                       tokens: Tensor) -> None:
    folder = tiny_random(family)
    model = open_model(folder)
    weights = changed(model, 0.1)
    found = Reference(model, tokens).positions(Runner(model, weights.get))
    p, q = plain(folder, tokens), plain(folder, tokens, weights)
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1).flatten(), atol=2e-5, rtol=1e-3)


def test_nodes_stand_in_for_weights(tiny_gemma3: Path, tokens: Tensor) -> None:
    model = open_model(tiny_gemma3)
    weights = changed(model, 0.1)
    reference = Reference(model, tokens)
    nodes = {path: Dense(weight) for path, weight in weights.items()}
    assert reference.compare(Runner(model, nodes.get)) == reference.compare(Runner(model, weights.get))


def test_padding_and_context_do_not_count(tiny_llama: Path, tokens: Tensor) -> None:
    """Padded on the right, the numbers are those of the text alone; skipped positions still give context."""
    model = open_model(tiny_llama)
    candidate = Runner(model, changed(model, 0.2).get)
    whole = Reference(model, tokens[:, :30]).positions(candidate)
    padded = torch.cat([tokens[:, :30], torch.full((5, 10), 2)], 1)
    real = torch.arange(40).expand(5, 40) < 30
    masked = Reference(model, padded, real).positions(candidate)
    torch.testing.assert_close(masked.kl, whole.kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(masked.loss, whole.loss, equal_nan=True, atol=1e-5, rtol=1e-5)
    skipped = Reference(model, tokens[:, :30], skip=12).positions(candidate)
    torch.testing.assert_close(skipped.kl.view(5, 18), whole.kl.view(5, 30)[:, 12:], atol=1e-6, rtol=1e-4)
    assert masked.summary().tokens == 150 and skipped.summary().tokens == 90


def test_error_by_window(tiny_llama: Path, tokens: Tensor) -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0])
    error, by = clustered_error(values, torch.tensor([0, 0, 1, 1, 1]))
    sums = torch.tensor([4 - 2 * 2.6, 9 - 3 * 2.6])
    assert by == "window" and error == pytest.approx(float((2 * sums.square().sum()).sqrt() / 5), rel=1e-6)
    model = open_model(tiny_llama)
    alone = Reference(model, tokens[:1]).compare(Runner(model, changed(model, 0.2).get))
    assert alone.stderr_by == "token" and alone.windows == 1 and alone.kl_stderr > 0


def test_damaged_candidates_and_empty_text(tiny_llama: Path, tokens: Tensor) -> None:
    model = open_model(tiny_llama)
    reference = Reference(model, tokens)
    head = model.map.head.path
    for bad in (float("nan"), float("inf")):
        weight = model.weight(head).clone()
        weight[7, 3] = bad
        with pytest.raises(ModelError, match="NaN or infinity in window 0"):
            reference.compare(Runner(model, {head: weight}.get))
    with pytest.raises(DataError, match="nothing is left"):
        Reference(model, tokens[:, :1])
    with pytest.raises(DataError, match="nothing is left"):
        Reference(model, tokens, skip=39)


def test_tables(tiny_llama: Path, tokens: Tensor) -> None:
    model = open_model(tiny_llama)
    places = torch.tensor([3, 20, 39])
    p = log_probs(Runner(model), tokens, places).flatten(0, 1)
    wanted = plain(tiny_llama, tokens)[:, places].flatten(0, 1).float()
    torch.testing.assert_close(p, wanted, atol=1e-4, rtol=1e-4)
    q = log_probs(Runner(model, changed(model, 0.2).get), tokens, places).flatten(0, 1)
    full = compare_tables(p, q, window=torch.arange(5).repeat_interleave(3))
    assert full.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert full.stderr_by == "window" and full.unlisted < 1e-5 and full.positions == 15
    same = compare_tables(p, p)
    assert same.kl_mean == pytest.approx(0, abs=1e-9) and same.top1 == 1 and same.log_prob_max == 0
    assert Agreement(**json.loads(json.dumps(asdict(full), allow_nan=False))) == full


def test_an_incomplete_table_bounds_the_kl_from_below(tiny_llama: Path, tokens: Tensor) -> None:
    model = open_model(tiny_llama)
    places = torch.arange(10, 30)
    p, q = (log_probs(runner, tokens, places).flatten(0, 1)
            for runner in (Runner(model), Runner(model, changed(model, 0.2).get)))
    whole = compare_tables(p, q).kl_mean
    found = []
    for kept in (20, 100, 400):
        top = torch.full_like(q, -math.inf).scatter(1, q.topk(kept).indices, q.topk(kept).values)
        found.append(compare_tables(p, top, tail=1 - top.exp().sum(1)).kl_mean)
        assert found[-1] == pytest.approx(compare_tables(p, top).kl_mean, rel=1e-4)
    assert found == sorted(found) and found[0] > 0 and found[-1] <= whole * (1 + 1e-6)
    assert found[-1] == pytest.approx(whole, rel=0.03)
    with pytest.raises(ModelError, match="NaN"):
        compare_tables(p, torch.full_like(q, math.nan))
