"""Any technique behind any other, on weights of trained models: it works within the laws, or says why not.

Two weights stand for all: a linear layer of an encoder and a convolution of a CNN, with the evidence that
samples gave. Every ordered pair of techniques edits both. A pair that does not fit refuses by name; a pair
that fits keeps the shape, keeps dropped weights dropped, counts its bits, and comes back from disk as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

import rarefy
from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.observe import survey
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RarefyError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Sum
from rarefy.core.nouns import Evidence, Receipt
from rarefy.formats.native import WEIGHTS, load_native, save_native
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.numerics.grids import Grid, Stored, integer_grid, nf4_grid
from rarefy.run.job import run_recipe
from rarefy.run.planning import techniques
from rarefy.run.progress import Silent
from rarefy.run.sweep import Work, rewrite
from tiny_networks import Digits

TECHNIQUES = techniques()
SAMPLES = 64
LINEAR, CONVOLUTION = "bert.encoder.layer.0.intermediate.dense.weight", "conv.0.weight"
# rows of 144 hold no groups of 32 or 64
FITTING: dict[str, dict[str, Any]] = {
    **{name: {"grid": integer_grid(4, 16)} for name in ("rtn", "gptq", "outliers")},
    "hqq": {"grid": Grid("int4f", tuple(map(float, range(16))), 16, Stored(), Stored())},
    "ternary": {"grid": Grid("ternary16", (-1.0, 0.0, 1.0), 16, Stored())},
    "loftq": {"grid": nf4_grid(16)},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {LINEAR: {}, CONVOLUTION: FITTING}


@dataclass(frozen=True, eq=False)
class Case:
    """One weight of a trained model and what was seen of it."""

    site: str
    weight: Tensor
    evidence: Evidence
    kernel: tuple[int, ...]

    def edited(self, name: str, tree: Node) -> tuple[Node, Receipt]:
        technique = TECHNIQUES[name](**SETTINGS[self.site].get(name, {}))
        return edit(self.site, tree, self.weight, technique, name, self.evidence,
                    torch.Generator().manual_seed(0), self.kernel)


@pytest.fixture(scope="module")
def cases(tiny_encoder: Path, tiny_cnn: Digits) -> dict[str, Case]:
    encoder = open_any(tiny_encoder)
    assert isinstance(encoder, Network)
    text = read_examples(encoder, tiny_encoder / "train.tsv", count=SAMPLES)
    cnn = Network.from_module(tiny_cnn.module)
    return {LINEAR: _case(encoder, LINEAR, text),
            CONVOLUTION: _case(cnn, CONVOLUTION, read_examples(cnn, tiny_cnn.train, count=SAMPLES))}


def _case(network: Network, path: str, examples: Examples) -> Case:
    for seen in survey(network, examples, torch.Generator().manual_seed(0)):
        if seen.site.path == path:
            return Case(path, network.weight(path).contiguous(), seen.evidence, seen.site.kernel)
    raise AssertionError(f"{path} was not seen")


@pytest.fixture(scope="module")
def first(cases: dict[str, Case]) -> Any:
    """``first(site, name)``: what one technique makes of the plain weight, or how it refuses."""
    @cache
    def made(site: str, name: str) -> Node | Exception:
        try:
            return cases[site].edited(name, Dense(cases[site].weight))[0]
        except (RarefyError, ValueError) as error:
            return error

    return made


@pytest.mark.parametrize("site", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize("other", sorted(TECHNIQUES))
@pytest.mark.parametrize("one", sorted(TECHNIQUES))
def test_pair(one: str, other: str, site: str, cases: dict[str, Case], first: Any, tmp_path: Path) -> None:
    case, before = cases[site], first(site, one)
    if isinstance(before, Exception):
        assert site in str(before)
        pytest.skip(f"{one} refuses the plain weight")
    try:
        after, receipt = case.edited(other, before)
    except (RarefyError, ValueError) as error:
        refusal = error
    else:
        holds(case, other, before, after, receipt, tmp_path / "out")
        return
    # numerics know no named errors: a job turns what they say of grids into one
    assert isinstance(refusal, RarefyError) or "not divisible" in str(refusal), repr(refusal)
    assert site in str(refusal) and "\n" not in str(refusal)


def holds(case: Case, other: str, before: Node, after: Node, receipt: Receipt, folder: Path) -> None:
    """The laws for a second edit."""
    assert after.shape == before.shape == tuple(case.weight.shape)
    assert bool(torch.isfinite(after.dense()).all())
    assert (receipt.bits_before, receipt.bits_after) == (before.bits(), after.bits())
    for old, new in masks(before, after, hasattr(TECHNIQUES[other], "sparsity") or other == "repair"):
        assert not bool((new.keep & ~old.keep).any())
        assert not bool(new.dense()[~old.keep].any())
    same_from_disk(after, folder)


def masks(before: Node, after: Node, grows: bool) -> Iterator[tuple[Masked, Masked]]:
    """Every mask of a tree, and what became of it. grows: something may be put around or beside a node."""
    if grows and type(after) is not type(before):
        if isinstance(after, Sum):  # what repairs a node is added to it
            yield from masks(before, after.terms[0], False)
        return  # a mask around what had none
    if isinstance(before, Masked):
        assert isinstance(after, Masked), "a mask is gone"
        yield before, after
    elif type(before) is type(after):
        for old, new in zip(before.children(), after.children(), strict=False):
            yield from masks(old, new, grows)


def same_from_disk(tree: Node, folder: Path) -> None:
    """The bytes on disk are the bits that the tree counts, every stream rounded up to bytes."""
    stored = save_native(folder, {"w": tree}, {}, {})
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        streams = len(file.keys())
    back = load_native(folder).trees["w"]
    assert torch.equal(back.dense(), tree.dense()) and back.bits() == tree.bits()
    assert 0 <= stored * 8 - tree.bits() < 8 * streams


QUANTIZED = {"quantease", "entropy"}  # improve or code what others quantized


def test_most_pairs_work(cases: dict[str, Case], first: Any) -> None:
    """So that a technique that begins to refuse everything is noticed; what leaves none of its kind over
    (a hashed weight is no Dense) is refused, and rightly."""
    refused = {name for name in TECHNIQUES if isinstance(first(CONVOLUTION, name), Exception)}
    assert refused == QUANTIZED
    refused = {name for name in TECHNIQUES if isinstance(first(LINEAR, name), Exception)}
    assert refused == {*QUANTIZED, "cp", "tucker"}  # the two decompose windows of convolutions


def test_job_names_the_site_where_a_grid_does_not_divide(tiny_cnn: Digits) -> None:
    network = Network.from_module(tiny_cnn.module)
    chain = (("svd", TECHNIQUES["svd"](rank=5)), ("rtn", TECHNIQUES["rtn"]()))
    with pytest.raises(EditError, match=r"fc\.weight: 5 columns not divisible by int4g32's block 32"):
        rewrite(network, network.map.by_path["fc.weight"], Work(chain, ""), None, 0)


# ---- recipes -------------------------------------------------------------------------------------------


def recipe(path: Path, model: Path, target: str, *steps: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"model": str(model), "target": target, "effort": "quick",
                                    "data": ["python-docs"], "steps": list(steps)}))
    return path


def test_three_steps_for_torch(tiny_llama_wide: Path, tmp_path: Path) -> None:
    """Half of the weights dropped, a quarter of the rest repaired by low rank, what is kept rounded."""
    mlp = ["*.mlp.*"]
    written = recipe(tmp_path / "recipe.yaml", tiny_llama_wide, "torch",
                     {"technique": "wanda", "where": mlp, "settings": {"sparsity": 0.5}},
                     {"technique": "repair", "where": mlp, "settings": {"rank": 32}},
                     {"technique": "rtn", "where": mlp, "format": "int8-g32"})
    result = run_recipe(written, tmp_path / "out", Silent())
    trees = load_native(result.exported).trees
    edited = {path: tree for path, tree in trees.items() if ".mlp." in path}
    assert len(edited) == 6
    for path, tree in edited.items():
        assert isinstance(tree, Sum), path
        kept, added = tree.terms
        assert isinstance(kept, Masked) and isinstance(kept.inner, Quantized)
        assert float(kept.keep.float().mean()) == pytest.approx(0.5, abs=0.01)
        assert isinstance(added, Product) and isinstance(added.left, Quantized) and added.left.shape[1] == 32
    assert all(isinstance(tree, Dense) for path, tree in trees.items() if path not in edited)
    done = [each["technique"] for each in result.receipt["sites"] if each["site"] in edited]
    assert done == ["wanda", "repair", "rtn"] * 6
    assert result.receipt["measured"]["float"]["kl_mean"] < 0.5
    assert torch.isfinite(rarefy.load(result.exported)(torch.arange(8)[None]).logits).all()


@pytest.mark.filterwarnings("ignore:.*already quantized")
def test_pruned_and_quantized_for_llama_cpp(tiny_llama_wide: Path, tmp_path: Path) -> None:
    """llama.cpp stores no masks: what was dropped is there as zeros, beside weights that were rounded."""
    written = recipe(tmp_path / "recipe.yaml", tiny_llama_wide, "llama.cpp",
                     {"technique": "wanda", "where": "*.mlp.*", "settings": {"sparsity": 0.5},
                      "format": "F16"},
                     {"technique": "rtn", "where": "*.self_attn.*", "format": "Q4_0"})
    result = run_recipe(written, tmp_path / "out", Silent())
    shares = {name: float((values == 0).float().mean())
              for name, values in rarefy.load(result.exported).named_parameters() if ".mlp." in name}
    assert len(shares) == 6 and list(shares.values()) == pytest.approx([0.5] * 6, abs=0.01)
    formats = {row["format"] for row in result.receipt["plan"] if ".self_attn." in row["site"]}
    assert formats == {"Q4_0"}
    assert result.receipt["measured"]["runtime"]["logit_error_vs_float"]["kl_mean"] < 0.01
