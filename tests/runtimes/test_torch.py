"""Law 8: every module that stands in for a tree computes what the tree stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from transformers.pytorch_utils import Conv1D

from rarefy import load
from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.tensors import CP, TensorTrain, Tucker
from rarefy.export.native import export_native, open_native, trees_of
from rarefy.models.model import open_model
from rarefy.models.recurrent import Recurrent, unrolled
from rarefy.numerics.grids import Grid, Stored, integer_grid
from rarefy.numerics.rounding import encode, fit
from rarefy.runtimes import torch as runtime
from rarefy.runtimes.recurrent import Int8Recurrent
from rarefy.runtimes.torch import AS_IS, EXPANDED, HASHED, LOOKED_UP, attach, lower

OUT, IN = 96, 128
EXACT, INT4, INT8 = 2e-6, 6e-3, 2e-2  # tolerated relative difference of each kind of kernel


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(*shape: int, seed: int = 0) -> Dense:
    return Dense(normal(*shape, seed=seed) / shape[-1]**0.5)


def rounded(grid: Grid, out: int = OUT, columns: int = IN) -> Quantized:
    weight = normal(out, columns) + 0.3
    found = fit(weight, torch.ones(columns), grid)
    return Quantized.of(encode(weight, found), found)


def mask(density: float, high: int = 1, wide: int = 1) -> Tensor:
    """Kept here and there, in tiles."""
    small = torch.rand(OUT // high, IN // wide, generator=torch.Generator().manual_seed(3)) < density
    return small.repeat_interleave(high, 0).repeat_interleave(wide, 1)


def gone(rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    keep = torch.ones(OUT, IN, dtype=torch.bool)
    if rows is not None:
        keep[rows] = False
    if columns is not None:
        keep[:, columns] = False
    return keep


UNSIGNED = Grid("unsigned", tuple(float(v) for v in range(16)), 32, Stored(), Stored())
TERNARY = Grid("ternary", (-1.0, 0.0, 1.0), 0)
EVEN = torch.arange(0, OUT, 2)
DIAGONAL = (torch.arange(OUT) // 16)[:, None] == torch.arange(IN) // 16 % 6
LINEAR: dict[str, tuple[Node, float, str]] = {
    "dense": (dense(OUT, IN), EXACT, AS_IS),
    "half": (Dense(normal(OUT, IN).half()), EXACT, AS_IS),
    "low rank": (Product(dense(OUT, 8), dense(8, IN)), EXACT, "two products of rank 8"),
    "high rank": (Product(dense(OUT, 60), dense(60, IN)), EXACT, EXPANDED),
    "low rank of codes": (Product(dense(OUT, 16), rounded(integer_grid(8, 0), 16)), INT8,
                          "two products of rank 16 (int8: activations rounded to 8 bits as well)"),
    "int8 per row": (rounded(integer_grid(8, 0)), INT8, "int8: activations rounded to 8 bits as well"),
    "int8 with zeros": (rounded(integer_grid(8, 0, symmetric=False)), INT8, "int8"),
    "int3 per row": (rounded(integer_grid(3, IN)), INT8, "int8"),
    "ternary": (rounded(TERNARY), INT8, "int8"),
    "int8 in groups": (rounded(integer_grid(8, 32)), EXACT, EXPANDED),
    "int4": (rounded(integer_grid(4, 32)), INT4, "int4 in bfloat16: fast for few tokens"),
    "int4 with zeros": (rounded(integer_grid(4, 64, symmetric=False)), INT4, "int4"),
    "int4 with plain zeros": (rounded(UNSIGNED), INT4, "int4"),
    "int2": (rounded(integer_grid(2, 64)), INT4, "int4"),
    "int4, odd rows": (rounded(integer_grid(4, 32), 90), EXACT, EXPANDED),
    "masked codes": (Masked(mask(0.6), rounded(integer_grid(4, 32))), INT4, "int4"),
    "masked codes per row": (Masked(mask(0.6), rounded(integer_grid(8, 0))), INT8, "int8"),
    "masked codes with zeros": (Masked(mask(0.6), rounded(integer_grid(4, 32, symmetric=False))), EXACT,
                                EXPANDED),
    "half kept": (Masked(mask(0.5), dense(OUT, IN)), EXACT, EXPANDED),
    "few kept": (Masked(mask(0.08), dense(OUT, IN)), EXACT, "sparse, 8% kept"),
    "tiles": (Masked(mask(0.2, 4, 8), dense(OUT, IN)), EXACT, "blocks of 4 x 4, 24% kept"),
    "large tiles": (Masked(DIAGONAL, dense(OUT, IN)), EXACT, "blocks of 4 x 4, 17% kept"),
    "rows": (Masked(gone(rows=EVEN), dense(OUT, IN)), EXACT, "dense, 48 x 128 of 96 x 128"),
    "columns": (Masked(gone(columns=EVEN), dense(OUT, IN)), EXACT, "dense, 96 x 80 of 96 x 128"),
    "both": (Masked(gone(EVEN, EVEN), dense(OUT, IN)), EXACT, "dense, 48 x 80 of 96 x 128"),
    "both, few": (Masked(gone(EVEN, EVEN) & mask(0.08), dense(OUT, IN)), EXACT,
                  "48 x 80 of 96 x 128, sparse"),
    "nothing": (Masked(torch.zeros(OUT, IN, dtype=torch.bool), dense(OUT, IN)), 0, "nothing is kept: zeros"),
    "sum": (Sum((rounded(integer_grid(8, 0)), Product(dense(OUT, 4), dense(4, IN)))), INT8, "int8"),
    "sum of wholes": (Sum((dense(OUT, IN), rounded(integer_grid(8, 32)))), EXACT, EXPANDED),
    "clustered": (Clustered(normal(1, 16, 1), torch.randint(0, 16, (OUT, IN), dtype=torch.uint8)), EXACT,
                  EXPANDED),
    "hashed": (Hashed(normal(100), 7, (OUT, IN)), EXACT, HASHED),
    "tensor train": (TensorTrain((dense(8, 8 * 3), dense(3 * 12, 16)), (8, 12), (8, 16)), EXACT,
                     "tensor train"),
    "a train of three": (TensorTrain((dense(4, 4 * 2), dense(2 * 4, 4 * 3), dense(3 * 6, 8)), (4, 4, 6),
                                     (4, 4, 8)), EXACT, "tensor train"),
    "fat tensor train": (TensorTrain((dense(8, 8 * 40), dense(40 * 12, 16)), (8, 12), (8, 16)), EXACT,
                         EXPANDED),
    "shared": (Shared("elsewhere", Product(dense(OUT, 8), dense(8, IN))), EXACT, "two products"),
    "shared whole": (Shared("elsewhere", dense(OUT, IN)), EXACT, AS_IS),
}


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_computes_with_its_tree(name: str, bias: bool) -> None:
    node, tolerance, how = LINEAR[name]
    plain = nn.Linear(IN, node.shape[0], bias=bias)
    tokens = 1 if how.startswith("int4") else 128
    module, said = lower(node, copy.deepcopy(plain), tokens=tokens)
    assert how in said
    offset = None if plain.bias is None else plain.bias.detach()
    for shape in ((1, IN), (5, IN), (2, 9, IN), (40, IN)):
        x = normal(*shape, seed=1)
        with torch.no_grad():
            close(module(x), nn.functional.linear(x, node.dense(), offset), tolerance or 1e-6)
    exact, said = lower(node, copy.deepcopy(plain), exact=True, tokens=tokens)
    with torch.no_grad():
        close(exact(x), nn.functional.linear(x, node.dense(), offset), EXACT)
        close(copy.deepcopy(module)(x), module(x), 0)
        close(module.weight, node.dense(), max(tolerance, 1e-6))
    assert "int" not in said


def test_what_is_faster_depends_on_how_many_tokens_come() -> None:
    for name, one, many in (("int4", "int4", EXPANDED), ("int8 per row", "int8", "int8"),
                            ("low rank", "two products", "two products")):
        node = LINEAR[name][0]
        assert one in lower(node, nn.Linear(IN, OUT))[1]
        assert many in lower(node, nn.Linear(IN, OUT), tokens=128)[1]
    network = nn.Sequential(nn.Linear(IN, OUT))  # does not generate, so many are meant
    assert attach(network, {"0.weight": LINEAR["int4"][0]}) == {"0.weight": EXPANDED}
    assert "int4" in attach(network, {"0.weight": LINEAR["int4"][0]}, tokens=1)["0.weight"]


def test_conv1d_of_transformers_is_transposed() -> None:
    plain = Conv1D(OUT, IN)
    for name in ("low rank", "dense", "int4"):
        node, tolerance, how = LINEAR[name]
        module, said = lower(node, copy.deepcopy(plain))
        x = normal(3, 4, IN)
        assert said.startswith(how)
        with torch.no_grad():
            close(module(x), nn.functional.linear(x, node.dense(), plain.bias), tolerance)


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "nothing"])
def test_an_embedding_looks_rows_up(name: str) -> None:
    node = LINEAR[name][0]
    plain = nn.Embedding(node.shape[0], IN, padding_idx=3)
    module, said = lower(node, plain)
    ids = torch.tensor([[1, 5, 1], [90 - 1, 0, 3]])
    with torch.no_grad():
        close(module(ids), nn.functional.embedding(ids, node.dense()), 1e-6)
        close(module.weight, node.dense(), 1e-6)
    assert said == (AS_IS if name in ("dense", "half", "shared whole") else LOOKED_UP)
    assert module.padding_idx == 3 and module.num_embeddings == node.shape[0]


def test_a_factorized_embedding_never_exists_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow table is looked up, and only the rows that were are widened."""
    node = Product(dense(400, 8), dense(8, IN))
    ids, table = torch.tensor([[7, 399], [0, 7]]), node.dense()
    module, said = lower(node, nn.Embedding(400, IN))
    monkeypatch.setattr(Product, "dense", lambda self: pytest.fail("the table was rebuilt"))
    with torch.no_grad():
        close(module(ids), table[ids], 1e-6)
    assert said == LOOKED_UP
    held = sum(values.numel() for values in vars(module)["_parameters"].values() if values is not None)
    assert held == 0 and node.bits() == 32 * 8 * (400 + IN)


KERNEL = (24, 3, 3)  # inputs, height, width
WIDE = 24 * 9


def filters(keep: Tensor, channels: Tensor) -> Tensor:
    return (keep[:, None] & channels.repeat_interleave(9)).contiguous()


CONVS: dict[str, tuple[Node, str]] = {
    "dense": (dense(32, WIDE), AS_IS),
    "low rank": (Product(dense(32, 6), dense(6, WIDE)), "two convolutions, 6 channels"),
    "high rank": (Product(dense(32, 30), dense(30, WIDE)), EXPANDED),
    "tucker": (Tucker(dense(32, 7), dense(7, 5 * 9), dense(24, 5), (3, 3)), "three convolutions, 5 and 7"),
    "fat tucker": (Tucker(dense(32, 30), dense(30, 24 * 9), dense(24, 24), (3, 3)), EXPANDED),
    "cp": (CP((dense(32, 9), dense(24, 9), dense(3, 9), dense(3, 9))), "4 convolutions of 9 channels"),
    "flat cp": (CP((dense(32, 9), dense(24, 9), dense(9, 9))), EXPANDED),
    "codes": (rounded(integer_grid(4, 0), 32, WIDE), EXPANDED),
    "filters": (Masked(filters(torch.arange(32) % 3 == 0, torch.arange(24) % 4 > 1), dense(32, WIDE)),
                "dense, 11 of 32 filters, 12 of 24 channels"),
    "weights": (Masked(torch.rand(32, WIDE) < 0.5, dense(32, WIDE)), EXPANDED),
    "nothing": (Masked(torch.zeros(32, WIDE, dtype=torch.bool), dense(32, WIDE)), EXPANDED),
}


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2},
                                      {"stride": (2, 1), "padding": (0, 2), "bias": False}],
                         ids=["plain", "stride", "same", "uneven"])
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_computes_with_its_tree(name: str, settings: dict[str, Any]) -> None:
    node, how = CONVS[name]
    plain = nn.Conv2d(24, 32, 3, **settings)
    x = normal(2, 24, 11, 12)
    with torch.no_grad():
        plain.weight.copy_(node.dense().view(32, *KERNEL))
        module, said = lower(node, copy.deepcopy(plain))
        close(module(x), plain(x), 3e-6)
        close(module(x[0]), plain(x[0]), 3e-6)
    assert said.startswith(how) or settings.get("stride")  # strides make first convolutions dearer


def test_convolutions_of_other_kinds() -> None:
    one = nn.Conv1d(24, 32, 5, padding=2, stride=2)
    trees: list[tuple[nn.Module, Node, str, tuple[int, ...]]] = [
        (one, CP((dense(32, 4), dense(24, 4), dense(5, 4))), "3 convolutions", (2, 24, 30)),
        (nn.Conv3d(8, 16, 3), Tucker(dense(16, 2), dense(2, 54), dense(8, 2), (3, 3, 3)), "three",
         (1, 8, 5, 6, 7)),
        (nn.Conv2d(24, 32, 3, groups=4), Product(dense(32, 2), dense(2, 54)), EXPANDED, (2, 24, 8, 8)),
        (nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), Product(dense(16, 2), dense(2, 72)),
         EXPANDED, (2, 8, 8, 8)),
    ]
    for plain, node, how, shape in trees:
        x = normal(*shape)
        with torch.no_grad():
            plain.weight.copy_(node.dense().view(plain.weight.shape))  # type: ignore[operator]
            module, said = lower(node, copy.deepcopy(plain))
            close(module(x), plain(x), 3e-6)
        assert said.startswith(how)


# ---- networks

class Tied(nn.Module):
    """An embedding and a head of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(OUT, IN)
        self.head = nn.Linear(IN, OUT, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids))
        return logits


@pytest.mark.parametrize("name", ["low rank", "int4", "clustered", "dense"])
def test_a_tie_stays_a_tie(name: str) -> None:
    node, tolerance, how = LINEAR[name]
    network, ids = Tied(), torch.tensor([[3, 1, 4]])
    said = attach(network, {"embed.weight": node}, tokens=1)["embed.weight"]
    with torch.no_grad():
        close(network(ids), nn.functional.linear(node.dense()[ids], node.dense()), tolerance)
    assert said == AS_IS if how == AS_IS else said.startswith(f"embed: {LOOKED_UP}; head: {how}")
    assert (network.head.weight is network.embed.weight) == (how == AS_IS)


def test_what_cannot_be_replaced_is_expanded() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    low = {path: Product(dense(out, 1), dense(1, 16)) for path, out in
           (("linear1.weight", 32), ("self_attn.in_proj_weight", 48), ("self_attn.out_proj.weight", 16))}
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for path, tree in low.items():
            plain.get_parameter(path).copy_(tree.dense())
        assert set(attach(layer, low).values()) == {EXPANDED}
        x = normal(2, 5, 16)
        close(layer(x), plain(x), 1e-5)
    root = nn.Linear(16, 32)
    assert attach(root, {"weight": low["linear1.weight"]}) == {"weight": EXPANDED}


def test_wrong_trees_are_named() -> None:
    network = Tied()
    with pytest.raises(TargetError, match=r"embd\.weight: the network has no such parameter; did you mean"):
        attach(network, {"embd.weight": dense(OUT, IN)})
    with pytest.raises(TargetError, match=r"embed\.weight: a tree of \(3, 128\) for a parameter of \(96"):
        attach(network, {"embed.weight": dense(3, IN)})


def test_hashed_weights_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.runtimes.modules.CHUNK", 10 * IN)
    seen: list[int] = []
    rows = Hashed.rows
    monkeypatch.setattr(Hashed, "rows", lambda self, index: seen.append(len(index)) or rows(self, index))
    node = LINEAR["hashed"][0]
    module, _ = lower(node, nn.Linear(IN, OUT))
    module(normal(4, IN))
    assert max(seen) == 10 and sum(seen) == OUT


def test_machines_without_the_kernels_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_has_int8", lambda: False)
    monkeypatch.setattr(runtime, "_has_int4", lambda: False)
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    for name in ("int8 per row", "int4", "few kept"):
        assert lower(LINEAR[name][0], nn.Linear(IN, OUT))[1] == EXPANDED


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_folder_runs_fast(family: str, tiny_random: Any, tmp_path: Any) -> None:
    model = open_model(tiny_random(family))
    trees: dict[str, Node] = {}
    for k, site in enumerate(model.map.sites):
        weight = model.weight(site.path)
        columns = weight.shape[1]
        if k % 3 == 0:
            found = fit(weight, torch.ones(columns), integer_grid(4, 32))
            trees[site.path] = Quantized.of(encode(weight, found), found)
        elif k % 3 == 1:
            U, S, V = torch.linalg.svd(weight, full_matrices=False)
            trees[site.path] = Product(Dense(U[:, :8] * S[:8]), Dense(V[:8].contiguous()))
        else:
            trees[site.path] = Masked(weight.abs() > weight.abs().quantile(0.95), Dense(weight))
    export_native(model, trees, tmp_path / "out")
    plain, fast, exact = (load(tmp_path / "out"), load(tmp_path / "out", fast=True),
                          load(tmp_path / "out", fast=True, exact=True))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted = plain(ids).logits
        close(fast(ids).logits, wanted, 0.05)
        close(exact(ids).logits, wanted, 1e-4)
    assert set(fast.lowered) == set(trees_of(open_native(tmp_path / "out")))
    hows = " ".join(fast.lowered.values())
    assert "two products of rank 8" in hows and "int4" in hows and "sparse, 5% kept" in hows
    assert LOOKED_UP in hows
    assert fast.generate(ids[:1], max_new_tokens=3, do_sample=False).shape[1] == 23


# ---- recurrent layers ----------------------------------------------------------------------------------


def recurrent(width: int) -> tuple[nn.Sequential, nn.Sequential, dict[str, Node]]:
    """A network, the same unrolled, and codes for the weights of its first layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = nn.Sequential(nn.GRU(8, width, 2, batch_first=True))
    steps = unrolled(copy.deepcopy(own))
    trees = {path: lower_rank(value.detach()) for path, value in steps.named_parameters() if value.ndim == 2}
    return own, steps, trees


def lower_rank(weight: Tensor) -> Node:
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    rank = min(4, S.numel())
    return Product(Dense(U[:, :rank] * S[:rank]), Dense(V[:rank].contiguous()))


def test_recurrent_layers_are_torchs_own_again() -> None:
    own, _, trees = recurrent(16)
    how = attach(own, trees)
    assert type(own[0]) is nn.GRU and set(how.values()) == {EXPANDED}
    tree = trees["0.layers.1.hh.weight"]
    torch.testing.assert_close(own[0].weight_hh_l1.detach(), tree.dense())
    whole, _, _ = recurrent(16)
    assert attach(whole, {}) == {} and type(whole[0]) is nn.GRU


def test_recurrent_layers_step_where_products_save_more(monkeypatch: pytest.MonkeyPatch) -> None:
    own, steps, trees = recurrent(16)
    x = normal(3, 5, 8)
    steps.load_state_dict({path: tree.dense() for path, tree in trees.items()}, strict=False)
    wanted = steps(x)[0]
    attach(expanded := copy.deepcopy(own), trees)
    monkeypatch.setattr(runtime, "STEPS", 0)
    how = attach(own, trees)
    assert isinstance(own[0], Recurrent) and how["0.layers.1.hh.weight"] == "two products of rank 4"
    for each in (own, expanded):
        torch.testing.assert_close(each(x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_hashed_recurrent_weights_are_never_stored() -> None:
    own, _, _ = recurrent(16)
    how = attach(own, {"0.layers.1.hh.weight": Hashed(normal(40), 0, (48, 16))})
    assert isinstance(own[0], Recurrent) and how["0.layers.1.hh.weight"] == HASHED


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_codes_run_in_one_kernel(kind: Any, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("no integer kernels here")
    monkeypatch.setattr("rarefy.runtimes.recurrent.WIDE", {"LSTM": 64, "GRU": 64})
    own = nn.Sequential(kind(16, 64, 2, batch_first=True, bidirectional=both, bias=both))
    steps = unrolled(copy.deepcopy(own))
    trees: dict[str, Node] = {path: rounded_rows(value.detach()) for path, value in steps.named_parameters()
                              if value.ndim == 2}
    steps.load_state_dict({path: tree.dense() for path, tree in trees.items()}, strict=False)
    exact = copy.deepcopy(own)
    assert set(attach(exact, trees, exact=True).values()) == {EXPANDED} and type(exact[0]) is kind
    fast = copy.deepcopy(own)
    assert set(attach(fast, trees).values()) == {runtime.INT8} and isinstance(fast[0], Int8Recurrent)
    x, h = normal(5, 7, 16), normal(4 if both else 2, 5, 64, seed=2)
    state = (h, h.sin()) if kind is nn.LSTM else h
    packed = pack_padded_sequence(x, [3, 7, 1, 5, 2], batch_first=True, enforce_sorted=False)
    one = tuple(each[:, 0] for each in state) if kind is nn.LSTM else h[:, 0]
    for arguments in ((x,), (x, state), (packed, state), (packed,), (x[0],), (x[0], one)):
        found, wanted = fast[0](*arguments), steps[0](*arguments)
        if isinstance(arguments[0], PackedSequence):
            assert torch.equal(found[0].sorted_indices, wanted[0].sorted_indices)
            found, wanted = (found[0].data, found[1]), (wanted[0].data, wanted[1])
        if kind is nn.LSTM:
            found, wanted = (found[0], *found[1]), (wanted[0], *wanted[1])
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.shape == theirs.shape and relative(ours, theirs) < 2 * INT8


def rounded_rows(weight: Tensor) -> Quantized:
    found = fit(weight, torch.ones(weight.shape[1]), integer_grid(8, 0))
    return Quantized.of(encode(weight, found), found)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_shared_codes_run_in_one_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("no integer kernels here")
    monkeypatch.setattr("rarefy.runtimes.recurrent.WIDE", {"GRU": 16})
    own, steps, _ = recurrent(16)
    trees: dict[str, Node] = {path: rounded_rows(value.detach()) for path, value in steps.named_parameters()
                              if value.ndim == 2}
    first, second = "0.layers.0.hh.weight", "0.layers.1.hh.weight"
    trees[second] = Shared(first, trees[first])
    steps.load_state_dict({path: tree.dense() for path, tree in trees.items()}, strict=False)
    assert set(attach(own, trees).values()) == {runtime.INT8} and isinstance(own[0], Int8Recurrent)
    x = normal(3, 5, 8)
    assert relative(own(x)[0], steps(x)[0]) < 2 * INT8
