"""Taking out neurons, heads and blocks: the view is a model, and what is taken out is what matters least."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rarefy.calibration.evidence import SLAB
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, ModelError, RecipeError
from rarefy.core.nodes import Dense
from rarefy.core.nouns import Evidence, Recipe, Step
from rarefy.core.structure import Passage, UnitGroup
from rarefy.export.gguf import export_gguf, gguf_bytes
from rarefy.formats.ggml import CODECS
from rarefy.formats.gguf import read_gguf
from rarefy.measure.divergence import Reference
from rarefy.models.model import Model, open_model
from rarefy.models.rewritten import collapsed
from rarefy.models.runner import Runner
from rarefy.models.shrunk import GROUPS, without_blocks, without_units
from rarefy.run.recipe import split
from rarefy.run.reshape import _groups, reshaped, thinned
from rarefy.runtimes.llamacpp import Session
from rarefy.techniques.depth.drop import Drop
from rarefy.techniques.prune.emptied import Emptied
from rarefy.techniques.prune.units import Units
from rarefy.techniques.quantize.rtn import RTN


@pytest.fixture(scope="module")
def model(tiny_llama_wide: Path) -> Model:
    return open_model(tiny_llama_wide)


@pytest.fixture(scope="module")
def tokens(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = next(site.shape[0] for site in model.map.sites if site.role == "embed")
    return torch.randint(0, rows, (6, 48), generator=generator)


def logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    runner = Runner(model)
    hidden, context = runner.stem(tokens)
    for block in range(runner.blocks):
        hidden = runner.block(block, hidden, context)
    return runner.logits(runner.norm(hidden))


def everything(model: Model, role: str) -> dict[int, torch.Tensor]:
    return {block: torch.arange(GROUPS[role](model, block).count) for block in range(model.map.blocks)}


@pytest.mark.parametrize("role", ["neurons", "heads", "queries"])
def test_keeping_everything_changes_nothing(model: Model, tokens: torch.Tensor, role: str) -> None:
    view = without_units(model, everything(model, role), role, {})
    torch.testing.assert_close(logits(view, tokens[:2]), logits(model, tokens[:2]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "gpt2"])
def test_units_that_write_zeros_are_taken_out_without_a_trace(
        family: str, tiny_random: object, tmp_path: Path) -> None:
    """Dead neurons and heads: the smaller network answers as the larger one, in every family."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_random(family))  # type: ignore[operator]
    model = open_model(tiny_random(family))  # type: ignore[operator]
    for role in ("neurons",) if family == "gpt2" else ("neurons", "heads"):
        kept = {}
        for block in range(model.map.blocks):
            units = GROUPS[role](model, block)
            kept[block] = torch.arange(units.count)[:-1] if units.count > 1 else torch.arange(1)
            reader = network.get_parameter(units.reader.path).data
            matrix = reader if model.map.by_path[units.reader.path].transposed else reader.T
            matrix[torch.isin(units.reader.unit, torch.arange(units.count)[kept[block].numel():])] = 0
        alive = Model.from_module(network, None)
        view = without_units(alive, kept, role, {})
        tokens = torch.arange(24).view(2, 12)
        torch.testing.assert_close(logits(view, tokens), logits(alive, tokens), rtol=1e-4, atol=1e-5)
        assert view.parameters < alive.parameters or kept[0].numel() == GROUPS[role](alive, 0).count


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_dead_queries_leave_their_keys_and_values(family: str, tiny_random: object) -> None:
    """The last query of each group reads nothing: without it the network answers as before."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_random(family))  # type: ignore[operator]
    alive = Model.from_module(network, None)
    heads, groups = alive.config.num_attention_heads, alive.config.num_key_value_heads
    kept = (torch.arange(heads) % (heads // groups) < heads // groups - 1).nonzero()[:, 0]
    for block in range(alive.map.blocks):
        reader = GROUPS["queries"](alive, block).reader
        network.get_parameter(reader.path).data[:, ~torch.isin(reader.unit, kept)] = 0
    view = without_units(alive, dict.fromkeys(range(alive.map.blocks), kept), "queries", {})
    assert (view.config.num_attention_heads, view.config.num_key_value_heads) == (len(kept), groups)
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(logits(view, tokens), logits(alive, tokens), rtol=1e-4, atol=1e-5)


def test_as_many_queries_stay_for_all_keys(tiny_llama: Path, tokens: torch.Tensor) -> None:
    model = open_model(tiny_llama)  # 4 queries, 2 groups
    done = thinned(model, Units("queries", 0.4, "taylor", multiple=1), tokens)
    assert (done.model.config.num_attention_heads, done.model.config.num_key_value_heads) == (2, 2)
    assert all(receipt.note == "2 of 4 queries left out" for receipt in done.receipts)
    done.model.config.num_attention_heads = 3
    with pytest.raises(ModelError, match="3 heads of queries cannot share 2"):
        GROUPS["heads"](done.model, 0)


def test_taylor_is_the_square_of_gradient_times_activation(model: Model, tokens: torch.Tensor) -> None:
    """Literally, with autograd through the whole network and the same draws of tokens."""
    seen = {group.block: group for group in _groups(model, Units(criterion="taylor", compensate=False),
                                                    tokens[:2], 0, lambda done, total: None)}
    caught: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    runner, total = Runner(model), torch.zeros(())
    generator = torch.Generator().manual_seed(0 ^ zlib.crc32(b"structure"))
    hidden, context = runner.stem(tokens[:2])
    hidden.requires_grad_()
    for block in range(runner.blocks):
        hidden = runner.block(block, hidden, context, lambda path, x, y: caught.update({path: (x, y)}))
    rows = runner.norm(hidden).flatten(0, 1)
    for part in rows.split(SLAB):
        p = runner.logits(part).softmax(-1)
        draw = torch.rand(len(p), 1, generator=generator) * p.detach().cumsum(-1)[:, -1:]
        sample = torch.searchsorted(p.detach().cumsum(-1), draw).clamp_max(p.shape[1] - 1)
        total = total - p.gather(1, sample).log().sum()
    for block, group in seen.items():
        x, y = caught[group.site]
        pull = torch.autograd.grad(total, y, retain_graph=True)[0]
        for unit in (0, 7):
            change = ((pull @ group.reader[:, unit]) * x[..., unit]).detach()
            assert group.removal is not None
            assert float(group.removal[unit]) == pytest.approx(
                float(change.square().sum()) / (2 * tokens[:2].numel()), rel=1e-3), block


def kl(model: Model, tokens: torch.Tensor, **settings: object) -> float:
    view = thinned(model, Units(multiple=8, **settings), tokens).model  # type: ignore[arg-type]
    return Reference(model, tokens).compare(Runner(view)).kl_mean


def test_refitted_criteria_beat_magnitude(model: Model, tokens: torch.Tensor) -> None:
    plain = {c: kl(model, tokens, criterion=c, compensate=False)
             for c in ("magnitude", "wanda", "taylor", "obs")}
    refitted = {c: kl(model, tokens, criterion=c, compensate=True) for c in ("magnitude", "wanda", "obs")}
    assert max(plain["wanda"], plain["taylor"]) < plain["magnitude"]
    assert all(refitted[c] < plain[c] for c in refitted)
    assert refitted["obs"] < plain["magnitude"] / 2


def test_obs_is_the_loss_after_the_best_refit() -> None:
    """Literally: drop each unit, solve least squares for the others, look at the loss."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(8, 400, generator=generator) * torch.linspace(0.3, 2, 8)[:, None]
    X[3] += 0.9 * X[2]
    W, f = torch.randn(5, 8, generator=generator), torch.rand(5, generator=generator)
    unit = torch.arange(8) // 2
    group = UnitGroup("s", "heads", 0, unit, W, torch.ones(4), Evidence(X @ X.T, 400, f))
    scores = Units(damping=0.0, multiple=1, units="heads").scores(group)
    for u in range(4):
        K = unit != u
        refit = torch.linalg.lstsq(X[K].T, (W @ X).T).solution.T
        loss = (W @ X - refit @ X[K]).square().sum(1) @ f / 400 / 2
        torch.testing.assert_close(scores[u], loss, rtol=1e-3, atol=1e-5)
        kept = torch.tensor([v for v in range(4) if v != u])
        mine = W @ Units(damping=0.0, multiple=1).refit(group, kept).T  # type: ignore[union-attr]
        torch.testing.assert_close(mine, refit, rtol=1e-3, atol=1e-4)


def test_blocks_that_do_nothing_go_first(model: Model, tokens: torch.Tensor) -> None:
    done = reshaped(model, Recipe("", (Step("drop", settings={"count": 1, "by": "kl", "keep_first": 0,
                                                              "keep_last": 0}),)), tokens)
    assert done.model.map.blocks == model.map.blocks - 1
    measured = {block: Reference(model, tokens).compare(
        Runner(without_blocks(model, frozenset({block})))).kl_mean for block in range(model.map.blocks)}
    gone = int(done.receipts[0].site.rpartition(".")[2])
    assert measured[gone] == min(measured.values())


def test_influence_ranks_blocks() -> None:
    passages = tuple(Passage(k, influence) for k, influence in enumerate((0.9, 0.2, 0.1, 0.3, 0.05)))
    assert Drop(count=2).drop(passages, lambda dropped: 0.0) == (1, 2)
    assert Drop(count=2, keep_last=0).drop(passages, lambda dropped: 0.0) == (2, 4)
    with pytest.raises(EditError, match="of 5 blocks only 3 may go"):
        Drop(count=4).drop(passages, lambda dropped: 0.0)
    with pytest.raises(EditError, match="of 1 blocks only 0 may go"):
        Drop().drop(passages[:1], lambda dropped: 0.0)


def test_searches_look_further_than_single_blocks() -> None:
    """1 and 2 cost little alone and much together; 3 and 4 together cost least."""
    costs = {frozenset({1}): 1.0, frozenset({2}): 1.1, frozenset({3}): 2.0, frozenset({4}): 2.1,
             frozenset({1, 2}): 9.0, frozenset({1, 3}): 4.0, frozenset({1, 4}): 5.0, frozenset({2, 3}): 4.5,
             frozenset({2, 4}): 6.0, frozenset({3, 4}): 3.0}
    passages = tuple(Passage(block, 0.0) for block in range(6))
    for search, gone in (("each", (1, 2)), ("greedy", (1, 3)), ("exact", (3, 4))):
        assert Drop(count=2, by="kl", search=search).drop(passages, costs.__getitem__) == gone
    with pytest.raises(EditError, match="too many to try; use search: greedy"):
        Drop(count=9, by="kl", search="exact").drop((Passage(0, 0.0), *passages * 5), lambda dropped: 0.0)


def test_a_bridge_does_what_is_linear(model: Model, tokens: torch.Tensor, tiny_llama: Path) -> None:
    """What was dropped leaves less of a trace, and the bridge is the solution by least squares."""
    deep, last = open_model(tiny_llama), {"keep_first": 1, "keep_last": 0}
    found = {fold: kl_without(deep, tokens, {**last, "fold": fold}) for fold in ("", "merge", "bridge")}
    assert found["bridge"] < found[""] / 2
    X, h = torch.randn(7, 5), torch.randn(3, 7)
    D = Drop(damping=0.0).bridge(X.T @ X, h @ X)
    torch.testing.assert_close(D, torch.linalg.lstsq(X, h.T).solution.T, rtol=1e-3, atol=1e-4)


def kl_without(model: Model, tokens: torch.Tensor, settings: dict) -> float:
    done = reshaped(model, Recipe("", (Step("drop", settings=settings),)), tokens)
    assert done.model.map.blocks == model.map.blocks - 1
    return Reference(model, tokens).compare(Runner(done.model)).kl_mean


def test_blocks_that_are_alike_merge_into_one(tiny_llama: Path, tokens: torch.Tensor) -> None:
    """Merged with its equal, a block stays what it is; with another, it becomes W + (W' - W)."""
    model = open_model(tiny_llama)
    merged = collapsed(model, (1,))
    path = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(merged.weight(path.format(0)), model.weight(path.format(1)))
    torch.testing.assert_close(merged.weight(path.format(2)), model.weight(path.format(2)))
    both = collapsed(model, (1, 2)).weight(path.format(0))
    torch.testing.assert_close(both, sum(model.weight(path.format(k)) for k in (1, 2))
                               - model.weight(path.format(0)))
    norm = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(merged.param(norm), model.param(norm.replace("0", "1")))


def test_what_is_left_is_exported(model: Model, tokens: torch.Tensor, tmp_path: Path) -> None:
    recipe = Recipe("", (Step("units", settings={"ratio": 0.25}),
                         Step("drop", settings={"keep_last": 0})))
    smaller = reshaped(model, recipe, tokens).model
    path = tmp_path / "model.gguf"
    export_gguf(smaller, {}, {site.path: "F16" for site in smaller.map.sites}, path)
    again = open_model(path)
    assert again.map.blocks == model.map.blocks - 1
    assert again.config.intermediate_size < model.config.intermediate_size
    torch.testing.assert_close(logits(again, tokens[:1]), logits(smaller, tokens[:1]), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("settings", "message"), [
    ({"units": "layers"}, "choose neurons, heads, queries"),
    ({"criterion": "wnda"}, "did you mean 'wanda'"),
    ({"ratio": 1.0}, "below 1"), ({"ratio": 0.0}, "above 0"), ({"multiple": 0}, "1 or more"),
    ({"spread": "even"}, "choose uniform or global"), ({"floor": 1.0}, "below 1"),
    ({"spread": "global", "criterion": "wanda"}, "only these costs")])
def test_settings_that_mean_nothing(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Units(**settings)


@pytest.mark.filterwarnings("ignore:.*already quantized")
def test_widths_of_their_own_go_through_llama_cpp(tiny_llama: Path, tokens: torch.Tensor, tmp_path: Path
                                                   ) -> None:
    """Neurons go where they cost least; the file holds each block's own, and is read back as it was."""
    model = open_model(tiny_llama)
    uneven = thinned(model, Units(ratio=0.4, criterion="taylor", spread="global", floor=0.1), tokens).model
    widths = uneven.config.block_neurons
    assert len(set(widths)) > 1
    assert all(width % 32 == 0 for width in widths)
    assert abs(sum(widths) / (3 * 256) - 0.6) < 0.1
    for name in ("F32", "Q8_0"):
        path, grid = tmp_path / f"{name}.gguf", CODECS[name].grid
        trees = {} if grid is None else {site.path: edit(
            site.path, Dense(uneven.weight(site.path)), uneven.weight(site.path), RTN(grid), "rtn", None,
            torch.Generator())[0] for site in uneven.map.sites}
        formats = {site.path: name for site in uneven.map.sites}
        size = export_gguf(uneven, trees, formats, path)
        assert size == path.stat().st_size == gguf_bytes(uneven, formats)
        again = open_model(path, dequantize=True)
        assert again.config.block_neurons == widths
        with Session(path, threads=1) as session:
            found = torch.tensor(next(iter(session.distributions(tokens[:1].numpy()))))
        wanted = logits(again, tokens[:1])[0].log_softmax(-1)
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
        if name == "F32":
            torch.testing.assert_close(wanted, logits(uneven, tokens[:1])[0].log_softmax(-1))
    held = {name: tensor.shape for name, tensor in read_gguf(path).tensors.items()}
    assert [held[f"blk.{block}.ffn_down.weight"][1] for block in range(3)] == widths


def test_costs_in_nats_compare_across_blocks() -> None:
    cheap, dear = torch.arange(1.0, 9.0), torch.arange(10.0, 18.0)
    technique = Units(ratio=0.25, criterion="taylor", spread="global", multiple=1)
    assert technique.counts((cheap, dear)) == (4, 8)
    assert replace(technique, floor=0.75).counts((cheap, dear)) == (6, 6)
    assert replace(technique, multiple=3).counts((cheap, dear)) == (6, 8)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_nobody_reads_goes_without_a_trace(family: str, tiny_random: object) -> None:
    """As many stay in every block as the block with the most of them needs; global: as many as each needs."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_random(family))  # type: ignore[operator]
    alive = Model.from_module(network, None)
    for block in range(alive.map.blocks):
        reader = GROUPS["neurons"](alive, block).reader
        network.get_parameter(reader.path).data[:, 3:9 + 2 * block] = 0
    count = GROUPS["neurons"](alive, 0).count
    done = thinned(alive, Emptied(multiple=1), None)
    assert done.model.config.intermediate_size == count - 6
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(logits(done.model, tokens), logits(alive, tokens), rtol=1e-4, atol=1e-5)
    if family == "llama":
        uneven = thinned(alive, Emptied(multiple=1, spread="global"), None).model
        assert uneven.config.block_neurons == [count - 6 - 2 * block for block in range(alive.map.blocks)]
        torch.testing.assert_close(logits(uneven, tokens), logits(alive, tokens), rtol=1e-4, atol=1e-5)


def test_where_widths_must_be_equal(tiny_gemma3: Path, model: Model, tokens: torch.Tensor) -> None:
    settings = {"ratio": 0.4, "criterion": "taylor", "spread": "global", "multiple": 1}
    with pytest.raises(ModelError, match="only neurons of Llama and Mistral may differ"):
        thinned(open_model(tiny_gemma3), Units(**settings), tokens)  # type: ignore[arg-type]
    recipe = Recipe("", (Step("units", settings=settings),), target="torch")
    with pytest.raises(RecipeError, match="torch loads one width for all blocks"):
        reshaped(model, recipe, tokens)


@pytest.mark.parametrize(("settings", "message"), [
    ({"by": "size"}, "choose influence or kl"), ({"count": 0}, "count must be 1 or more"),
    ({"search": "greedy"}, "set by: kl"), ({"fold": "sew"}, "choose merge or bridge"),
    ({"fold": "merge", "keep_first": 0}, "the first block has none before it")])
def test_drops_that_mean_nothing(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Drop(**settings)


def test_a_norm_stands_before_the_bridge(tiny_gemma3: Path, tokens: torch.Tensor) -> None:
    with pytest.raises(EditError, match="stands a norm"):
        reshaped(open_model(tiny_gemma3), Recipe("", (Step("drop", settings={"fold": "bridge"}),)), tokens)


def test_what_cannot_be_taken_out(model: Model, tokens: torch.Tensor, tiny_random: object) -> None:
    with pytest.raises(EditError, match="leaves none to take out in steps of"):
        thinned(model, Units(ratio=0.01, multiple=256), tokens)
    with pytest.raises(ModelError, match="GPT-2's width of a head"):
        GROUPS["heads"](open_model(tiny_random("gpt2")), 0)  # type: ignore[operator]
    with pytest.raises(ModelError, match="at least one must stay"):
        without_blocks(model, frozenset(range(model.map.blocks)))
    with pytest.raises(RecipeError, match="move it up"):
        split((Step("rtn"), Step("drop")))
    with pytest.raises(RecipeError, match="takes out parts of every block alike"):
        reshaped(model, Recipe("", (Step("drop", where=("role:up",)),)), tokens)
    with pytest.raises(EditError, match="needs calibration text"):
        reshaped(model, Recipe("", (Step("drop"),)), None)


def test_heads_that_are_alike_merge_without_a_trace(model: Model, tokens: torch.Tensor,
                                                    tiny_llama_wide: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_llama_wide)
    heads = model.config.num_key_value_heads
    for layer in network.model.layers:
        for matrix in (layer.self_attn.k_proj.weight.data, layer.self_attn.v_proj.weight.data):
            matrix.unflatten(0, (heads, -1))[:] = matrix.unflatten(0, (heads, -1))[:1].clone()
    alike = Model.from_module(network, None)
    done = reshaped(alike, Recipe("", (Step("grouped"),)), None)
    assert done.model.config.num_key_value_heads == 1
    assert all(receipt.error < 1e-10 for receipt in done.receipts)
    after, before = logits(done.model, tokens[:1]), logits(alike, tokens[:1])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_groups_that_do_not_divide(model: Model) -> None:
    with pytest.raises(EditError, match="cannot become 3"):
        reshaped(model, Recipe("", (Step("grouped", settings={"groups": 3}),)), None)
