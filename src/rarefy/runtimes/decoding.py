"""Write text with some of the blocks: tokens that leave early, and drafts that the other blocks check.

The blocks are cut at exits. A token that leaves behind block e has not been through the later ones, which
owe its keys and values to tokens behind it. The debt is kept: states wait in front of block e until a token
goes deeper, and go with it, all in one pass. So what later tokens attend to is what the whole network
computes, and nothing is copied or guessed (Bae et al. 2023, "Fast and Robust Early-Exiting", section 3.2).

    greedy        every token through all blocks
    early         a token leaves where it is sure: the answer may change
    speculative   the first blocks guess ``draft`` tokens, the others check all of them in one pass and
                  take back what they would not have said: the answer of ``greedy``, whatever was guessed
                  (Elhoushi et al. 2024, "LayerSkip", section 4.3)

An exit says ``head(norm(A h + b))`` of its state h; A and b are 1 and 0 or learnt from the last block's
distribution, everything else frozen (Belrose et al. 2023, "Eliciting Latent Predictions from Transformers
with the Tuned Lens", eq. 4). Where the vocabulary is large the head costs more than the blocks; guesses are
checked whatever they are, so they may come from its most frequent words alone (Zhao et al. 2025, "FR-Spec").
One text at a time.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.structure import ExitAnswers
from rarefy.export.native import network_of
from rarefy.models.attending import attention_parts
from rarefy.models.families import window_of
from rarefy.models.model import Model
from rarefy.runtimes.memory import Keep, Memory
from rarefy.techniques.depth.early_exit import EarlyExit
from rarefy.training.examples import Rows
from rarefy.training.loop import Batch, Loss, Settings, Task, fit


@dataclass(frozen=True, eq=False)
class Text:
    """What was written, [tokens], and through how many blocks each token went; checked: passes through the
    blocks behind the exit, where drafts are checked."""

    tokens: Int64[Tensor, " tokens"]
    blocks: Int64[Tensor, " tokens"]
    checked: int = 0


@dataclass(frozen=True, eq=False)
class Words:
    """Some tokens, and their rows of the head."""

    index: Int64[Tensor, " words"]
    rows: Float[Tensor, "words width"]


def frequent(windows: Int64[Tensor, "windows length"], count: int) -> Int64[Tensor, " words"]:
    """The tokens that occur most often, ``count`` at most, in the order of their numbers."""
    often = windows.flatten().bincount()
    most = often.argsort(descending=True, stable=True)[:min(count, int((often > 0).sum()))]
    return most.sort().values


class Exit(nn.Module):
    """What an exit does to a state before the network's own norm and head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.eye(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.turn, self.shift)


class Layered:
    """A language model that runs in parts. after: behind which blocks (from 0) its exits stand."""

    def __init__(self, model: Model, after: Sequence[int]) -> None:
        after, total = tuple(after), model.map.blocks
        if not after or list(after) != sorted(set(after)) or not 0 <= after[0] <= after[-1] < total - 1:
            raise RecipeError(f"exits after {list(after)}: choose rising numbers of blocks from 0 to "
                              f"{total - 2}")
        self.model, self.after = model, after
        self.network = network_of(model).eval().requires_grad_(False)
        family = model.map.family
        self.blocks: list[Any] = list(self.network.get_submodule(family.blocks))
        self.norm = self.network.get_submodule(family.norm)
        self.cuts = [0, *(block + 1 for block in after), total]
        self.exits = nn.ModuleList([Exit(model.config.hidden_size) for _ in after]).requires_grad_(False)
        self._calls: list[inspect.BoundArguments] = []  # what blocks are called with besides the state
        self._at = (0, 0)                                # ... from which position, for how many tokens
        body = self.network.get_submodule(family.body)
        kept: dict[int, Any] = {id(each): each for each in (*body.parameters(), *body.buffers())}
        kept[id(self.network.get_submodule(family.blocks))] = nn.ModuleList(
            [_Recorder(block, self._calls) for block in self.blocks])
        kept[id(self.norm)] = nn.Identity()
        self._shell = copy.deepcopy(body, kept)  # what is around the blocks; no number is copied

    # ---- parts

    def stem(self, tokens: Int64[Tensor, "1 length"], start: int) -> Float[Tensor, "1 length width"]:
        """What the first block is given for tokens at positions from ``start``."""
        self._calls.clear()
        self._at = (start, tokens.shape[1])
        positions = torch.arange(start, start + tokens.shape[1])[None]
        out: Tensor = self._shell(input_ids=tokens, position_ids=positions, use_cache=False)[0]
        return out

    def part(self, index: int, hidden: Tensor, start: int, memory: Memory) -> Tensor:
        """The blocks between two exits, on states at positions from ``start``; they remember them."""
        length = hidden.shape[1]
        if self._at != (start, length):
            self.stem(torch.zeros(1, length, dtype=torch.int64), start)
        for block in range(self.cuts[index], self.cuts[index + 1]):
            bound = self._calls[block]
            mask = self._mask(block, length, start, memory.places(block))
            given = {"past_key_values": memory, "attention_mask": mask, "hidden_states": hidden}
            bound.arguments.update({name: value for name, value in given.items()
                                    if name in bound.signature.parameters})
            with self._attention(block, memory.heeds(block)) as weights:
                out = self.blocks[block](*bound.args, **bound.kwargs)
            memory.forget(block, start, weights[0] if weights else None)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    @contextmanager
    def _attention(self, block: int, wanted: bool) -> Iterator[list[Tensor]]:
        """While this lasts, where a block's attention goes is caught, [1, heads, queries, keys]."""
        if not wanted:
            yield []
            return
        part, caught = attention_parts(self.network)[block], list[Tensor]()
        before = part.config._attn_implementation
        hook = part.register_forward_hook(lambda module, args, out: caught.append(out[1]))
        part.config._attn_implementation = "eager"  # the fused ones do not say
        try:
            yield caught
        finally:
            part.config._attn_implementation = before
            hook.remove()

    def words(self, index: Int64[Tensor, " words"]) -> Words:
        """Only these tokens."""
        head = self.network.get_output_embeddings()
        if head.bias is not None or not len(index):
            raise RecipeError(f"{self.model.name}: {len(index)} words, a head "
                              f"{'with' if head.bias is not None else 'without'} a bias; it takes one word "
                              "at least, and no bias")
        return Words(index, head.weight[index].contiguous())

    def logits(self, hidden: Tensor, exit_: int | None = None, words: Words | None = None
               ) -> Float[Tensor, "_ length words"]:
        """What the network says of states, or an exit of its own; of some words alone."""
        state = self.norm(hidden if exit_ is None else self.exits[exit_](hidden))
        head = self.network.get_output_embeddings()
        values: Tensor = (head(state) if words is None else nn.functional.linear(state, words.rows)).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return values if cap is None else torch.tanh(values / cap) * cap

    def _mask(self, block: int, length: int, start: int, places: Tensor) -> Tensor:
        """0 where a token may look and -inf elsewhere, [1, 1, length, remembered + length]."""
        window, new = window_of(self.model.config, block), torch.arange(start, start + length)
        back = new[:, None] - torch.cat([places, new])
        seen = back >= 0 if not window else (back >= 0) & (back < window)
        return torch.zeros(1, 1, *seen.shape).masked_fill_(~seen, -torch.inf)

    def memory(self, bits: int = 32, keep: Keep | None = None) -> Memory:
        """An empty memory. keep: of blocks that look back to the beginning; others keep their window, which
        changes nothing. None: everything is kept."""
        if keep is None:
            return Memory(len(self.blocks), bits)
        windows = [window_of(self.model.config, block) for block in range(len(self.blocks))]
        return Memory(len(self.blocks), bits,
                      tuple(keep if window is None else Keep(0, window) for window in windows))

    def read(self, text: Int64[Tensor, "1 length"], memory: Memory, chunk: int = 64, skip: int = 0
             ) -> Iterator[tuple[int, Float[Tensor, "places words"]]]:
        """The text ``chunk`` tokens at a time: the position where each chunk begins, and what is said behind
        its tokens; what the memory forgets between two chunks is not there for the next. skip: chunks that
        begin before this position only give context."""
        for start in range(0, text.shape[1], chunk):
            with torch.no_grad():
                hidden = self.stem(text[:, start:start + chunk], start)
                for index in range(len(self.cuts) - 1):
                    hidden = self.part(index, hidden, start, memory)
                said = self.logits(hidden)[0] if start >= skip else None
            if said is not None:
                yield start, said

    def likelihoods(self, text: Int64[Tensor, "1 length"], memory: Memory, chunk: int = 64, skip: int = 0
                    ) -> Float[Tensor, " places"]:
        """Log-likelihood of every token but the first; arguments as for ``read``."""
        found = []
        for start, logits in self.read(text, memory, chunk, skip):
            after = text[0, start + 1:start + 1 + chunk]
            found.append(logits[:len(after)].log_softmax(-1).gather(1, after[:, None])[:, 0])
        return torch.cat(found)

    # ---- writing

    def prefill(self, prompt: Int64[Tensor, "1 length"], memory: Memory) -> int:
        """The prompt through all blocks, and the first token behind it."""
        hidden = self.stem(prompt, 0)
        for index in range(len(self.cuts) - 1):
            hidden = self.part(index, hidden, 0, memory)
        return int(self.logits(hidden[:, -1:]).argmax(-1))

    @torch.no_grad()
    def greedy(self, prompt: Int64[Tensor, "1 length"], count: int, *, bits: int = 32,
               keep: Keep | None = None) -> Text:
        """``count`` tokens, each through all blocks. bits, keep: of the memory."""
        never = EarlyExit()
        return self.early(prompt, count, never, float("inf"), bits=bits, keep=keep)

    @torch.no_grad()
    def early(self, prompt: Int64[Tensor, "1 length"], count: int, technique: EarlyExit, threshold: float, *,
              bits: int = 32, keep: Keep | None = None) -> Text:
        """``count`` tokens, each through as many blocks as it takes to be sure."""
        memory, total = self.memory(bits, keep), len(self.cuts) - 1
        token, place = self.prefill(prompt, memory), prompt.shape[1]
        tokens, blocks = [token], [len(self.blocks)]
        waiting: list[list[Tensor]] = [[] for _ in range(total)]
        while len(tokens) < count:
            states, said = self.stem(torch.tensor([[token]]), place), list[Tensor]()
            for index in range(total):
                owed = [*waiting[index], states]
                states = torch.cat(owed, 1)
                states = self.part(index, states, place + 1 - states.shape[1], memory)
                waiting[index] = []
                last = index == total - 1
                if not last and threshold == float("inf"):  # nobody leaves, so nobody need be asked
                    continue
                logits = self.logits(states[:, -1:], None if last else index)[0]
                said.append(logits)
                if last or float(technique.certainty(torch.stack(said), total)) >= threshold:
                    break
            if index < total - 1:
                waiting[index + 1].append(states)
            token, place = int(said[-1].argmax(-1)), place + 1
            tokens.append(token)
            blocks.append(self.cuts[index + 1])
        return Text(torch.tensor(tokens), torch.tensor(blocks))

    @torch.no_grad()
    def speculative(self, prompt: Int64[Tensor, "1 length"], count: int, *, draft: int = 4,
                    words: Words | None = None, bits: int = 32) -> Text:
        """``count`` tokens as ``greedy`` writes them: the first exit guesses, the blocks behind it check.

        words: of which guesses are made (None: all). With a rounded memory only nearly so: what is taken back
        was rounded at other places.
        """
        if len(self.after) != 1 or draft < 1:
            raise RecipeError(f"draft={draft}, exits after {list(self.after)}: guesses come from one exit, "
                              "at least one at a time")
        memory = self.memory(bits)
        token, place, checked = self.prefill(prompt, memory), prompt.shape[1], 0
        tokens, blocks = [token], [len(self.blocks)]
        while len(tokens) < count:
            states, guesses = [], []
            for step in range(min(draft, count - len(tokens))):
                state = self.part(0, self.stem(torch.tensor([[token]]), place + step), place + step, memory)
                token = int(self.logits(state, 0, words).argmax(-1))
                token = token if words is None else int(words.index[token])
                states.append(state)
                guesses.append(token)
            deep = self.part(1, torch.cat(states, 1), place, memory)
            checked += 1
            right = self.logits(deep)[0].argmax(-1)
            agreed = int((right == torch.tensor(guesses)).long().cumprod(0).sum())
            taken = right[:min(agreed + 1, len(guesses))].tolist()
            tokens += taken
            blocks += [self.cuts[1]] * agreed + [len(self.blocks)] * (len(taken) - agreed)
            place, token = place + len(taken), taken[-1]
            memory.crop(place)
        return Text(torch.tensor(tokens), torch.tensor(blocks), checked)

    # ---- exits that learn, and what they say

    def states(self, windows: Int64[Tensor, "batch length"]) -> tuple[list[Tensor], Tensor]:
        """States at every exit and behind the last block, window by window."""
        found: list[list[Tensor]] = []
        for window in windows:
            memory, each = Memory(len(self.blocks)), [self.stem(window[None], 0)]
            for index in range(len(self.cuts) - 1):
                each.append(self.part(index, each[-1], 0, memory))
            found.append(each[1:])
        stacked = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return stacked[:-1], stacked[-1]

    def learn(self, windows: Int64[Tensor, "windows length"], settings: Settings, words: Words | None = None
              ) -> None:
        """Teach every exit to say what the last block says; the network stays as it is.

        settings: a batch is so many tokens. words: of which the exits will speak (None: all).
        """
        with torch.no_grad():
            parts, last = self.states(windows)
        rows = Rows({"states": torch.stack([part.flatten(0, 1) for part in parts], 1),
                     "last": last.flatten(0, 1)})
        fit(_Lesson(self, words), rows, settings)
        self.exits.requires_grad_(False)

    @torch.no_grad()
    def answers(self, windows: Int64[Tensor, "windows length"], count: int = 512, seed: int = 0
                ) -> ExitAnswers:
        """What exits and network say of ``count`` tokens of some windows, to calibrate a threshold with."""
        parts, last = self.states(windows)
        chosen = torch.randperm(last.shape[0] * last.shape[1], generator=torch.Generator().manual_seed(seed))
        chosen = chosen[:count]
        rows = [self.logits(part.flatten(0, 1)[chosen][None], k)[0] for k, part in enumerate(parts)]
        return ExitAnswers(torch.stack([*rows, self.logits(last.flatten(0, 1)[chosen][None])[0]]))


class _Recorder(nn.Module):
    """Stands where a block stands and keeps what it is called with."""

    def __init__(self, block: nn.Module, calls: list[inspect.BoundArguments]) -> None:
        super().__init__()
        self.calls, self.signature = calls, inspect.signature(block.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        self.calls.append(bound)
        return bound.arguments["hidden_states"]


class _Lesson(Task):
    """Exits learn the last block's distribution: KL per token, summed over exits."""

    def __init__(self, layered: Layered, words: Words | None) -> None:
        super().__init__()
        self.layered, self.words = layered, words
        self.exits = layered.exits.requires_grad_(True)

    def forward(self, batch: Batch) -> Loss:
        with torch.no_grad():
            wanted = self.layered.logits(batch["last"][None], None, self.words).log_softmax(-1)
        total = torch.zeros(())
        for place in range(len(self.exits)):
            said = self.layered.logits(batch["states"][None, :, place], place, self.words).log_softmax(-1)
            total = total + (wanted.exp() * (wanted - said)).sum()
        return Loss(total, torch.tensor(float(len(batch["last"]))))
