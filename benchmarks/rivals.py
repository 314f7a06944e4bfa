"""What llama.cpp's own quantizer makes of the benchmark model, stock and tuned by hand.

The stock files keep the tied embedding at Q8_0 (its rows of 640 do not divide by 256), which is two
thirds of their bytes. A user who knows that sets the embedding's type, and then single tensors'
types: the second and third groups are what such a user would try near our sizes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rival:
    """One call of llama-quantize: its type, the embedding's, and types of single tensors by name."""

    body: str
    embedding: str = ""
    tensors: tuple[tuple[str, str], ...] = ()
    pure: bool = False

    @property
    def kind(self) -> str:
        """How much a user has to know to make this file."""
        return "by hand" if self.tensors or self.pure else "embedding" if self.embedding else "stock"

    @property
    def name(self) -> str:
        """The row's name in the table."""
        parts = [self.body + (" pure" if self.pure else "")]
        parts += [f"embedding {self.embedding}"] if self.embedding else []
        parts += [f"{name} {kind}" for name, kind in self.tensors]
        return ", ".join(parts)

    @property
    def stem(self) -> str:
        """A file name."""
        return self.name.replace(", ", "-").replace(" ", "_").replace("|", "+")

    @property
    def options(self) -> tuple[str, ...]:
        """Options of llama-quantize before the file names."""
        words = ["--pure"] if self.pure else []
        words += ["--token-embedding-type", self.embedding.lower()] if self.embedding else []
        for name, kind in self.tensors:
            words += ["--tensor-type", f"{name}={kind.lower()}"]
        return tuple(words)


STOCK = tuple(Rival(body) for body in
              ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_NL", "Q4_0", "Q2_K"))

EMBEDDING = tuple(Rival(body, embedding) for body, embedding in (
    ("Q8_0", "Q5_1"), ("Q6_K", "Q5_1"), ("Q8_0", "Q5_0"), ("Q5_K_M", "Q5_0"), ("Q5_1", "Q5_0"),
    ("Q6_K", "IQ4_NL"), ("Q4_K_M", "Q5_0"), ("IQ4_NL", "Q5_1"), ("Q5_K_M", "Q4_1"), ("Q4_K_M", "Q4_0"),
    ("Q4_K_M", "IQ4_NL"), ("IQ4_NL", "Q4_1"), ("IQ4_NL", "IQ4_NL"), ("Q4_0", "Q4_0"), ("Q2_K", "IQ4_NL")))

BY_HAND = (
    Rival("Q6_K", "IQ4_NL", (("ffn_down", "Q5_K"),)),
    Rival("Q5_0", "Q5_0", (("attn_k", "Q8_0"), ("attn_v", "Q8_0"), ("ffn_down", "Q6_K"),
                           ("attn_output", "Q5_K"))),
    Rival("Q4_K_M", "Q5_1", (("ffn_gate", "IQ4_NL"), ("ffn_up", "IQ4_NL"))),
    Rival("Q5_1", "IQ4_NL", (("attn_q", "Q8_0"), ("attn_k", "Q8_0"), ("attn_v", "Q8_0"),
                             ("ffn_down", "Q6_K"), ("attn_output", "Q6_K"))),
    Rival("IQ4_NL", "IQ4_NL", (("attn_k", "Q5_1"), ("attn_v", "Q8_0"), ("ffn_down", "Q6_K"),
                               ("attn_output", "Q6_K"))),
    Rival("IQ4_NL", "IQ4_NL", (("attn_v", "Q8_0"), ("ffn_down", "IQ4_XS"), ("attn_output", "IQ4_XS"))),
    Rival("IQ4_NL", "IQ4_NL", (("ffn_down", "Q4_K"), ("attn_output", "Q4_K"))),
    Rival("Q5_0", "Q5_0", (("attn_q", "IQ4_NL"), ("attn_v", "Q5_1"), ("ffn_down", "Q5_K"),
                           ("attn_output", "Q5_K"))),
    Rival("Q5_0", "IQ4_NL", (("attn_q", "IQ4_NL"), ("attn_v", "Q5_1"), ("ffn_down", "Q5_K"),
                             ("attn_output", "Q5_K"))),
)

RIVALS = STOCK + EMBEDDING + BY_HAND
