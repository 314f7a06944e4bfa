"""A receipt as ``run`` writes it, with the shape and about the numbers of Gemma-3-270M at 160 MB."""

from __future__ import annotations

import math
from typing import Any

import pytest

SHAPES = {"q": (1024, 640), "k": (256, 640), "v": (256, 640), "o": (640, 1024),
          "gate": (2048, 640), "up": (2048, 640), "down": (640, 2048)}
NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
BITS = {"Q2_0": 2.25, "Q3_K": 3.4375, "MXFP4": 4.25, "IQ4_NL": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0,
        "Q6_K": 6.5625, "Q8_0": 8.5}


def row(site: str, role: str, block: int | None, shape: tuple[int, int], kind: str,
        damage: float) -> dict[str, Any]:
    weights = math.prod(shape)
    return {"site": site, "role": role, "block": block, "shape": list(shape), "format": kind,
            "bytes": int(weights * BITS[kind] / 8), "bits_per_weight": BITS[kind], "damage": damage}


def choice(role: str, block: int) -> str:
    """Edges and small matrices get more bits, as a planner would have it; K-types fit rows of 256."""
    match role:
        case "k" | "v":
            return "Q8_0" if block == 0 else "Q5_0" if block in (1, 16, 17) else "Q4_1"
        case "o":
            return "Q5_0" if block in (0, 17) else "Q3_K" if block in (8, 9) else "IQ4_NL"
        case "down" if block in (0, 17):
            return "Q6_K" if block == 0 else "Q4_1"
        case "down":
            return "Q3_K" if block in (9, 10, 11) else "IQ4_NL"
        case "q":
            return "MXFP4" if 5 <= block <= 11 else "IQ4_NL"
        case _:
            return "MXFP4" if 4 <= block <= 12 else "IQ4_NL"


def plan_rows(blocks: int = 18) -> list[dict[str, Any]]:
    rows = [row("model.embed_tokens.weight", "embed", None, (262144, 640), "IQ4_NL", 0.0341)]
    for block in range(blocks):
        for role, shape in SHAPES.items():
            damage = 0.0004 * (1 + math.sin(block)) * BITS["IQ4_NL"] / BITS[choice(role, block)] + 1e-5
            rows.append(row(f"model.layers.{block}.{NAMES[role]}.weight", role, block, shape,
                            choice(role, block), damage))
    return rows


def step(row: dict[str, Any]) -> dict[str, Any]:
    weights = math.prod(row["shape"])
    note = "damping raised to 0.1" if row["site"].endswith("3.mlp.down_proj.weight") else ""
    return {"site": row["site"], "technique": "gptq", "bits_before": 16 * weights,
            "bits_after": 8 * row["bytes"], "error": 0.0123, "seconds": 0.4, "format": row["format"],
            "note": note}


@pytest.fixture
def receipt() -> dict[str, Any]:
    return sample()


def measured() -> dict[str, Any]:
    summary = {"kl_mean": 0.0931, "kl_stderr": 0.0026, "kl_median": 0.0412, "kl_p999": 1.37, "top1": 0.8512,
               "perplexity": 17.71, "perplexity_original": 16.91, "tokens": 4096, "windows": 8}
    return {
        "float": summary,
        "second_domain": {**summary, "kl_mean": 0.0618, "kl_stderr": 0.0031, "kl_median": 0.0123,
                          "kl_p999": 1.9, "top1": 0.893, "perplexity": 4.11, "perplexity_original": 3.98},
        "runtime": {"name": "xllamacpp", "version": "2026.10.11549", "kl_mean": 0.0948, "kl_stderr": 0.0041,
                    "top1": 0.8489, "positions": 1024,
                    "logit_error_vs_float": {"kl_mean": 0.0011, "kl_max": 0.021, "log_prob_max": 0.62}},
    }


def completions() -> list[dict[str, str]]:
    code = "\n    if n <= 1:\n        return n\n    return fibonacci(n-1) + fibonacci(n-2)"
    return [
        {"prompt": "The capital of France is",
         "original": " Paris. It is the largest city in the country and the seat of its government.",
         "compressed": " Paris. It is the largest city in France and one of the most visited."},
        {"prompt": "def fibonacci(n):", "original": code, "compressed": code},
    ]


def sample() -> dict[str, Any]:
    rows = plan_rows()
    return {
        "rarefy": "0.1.0", "created": "2026-03-04T16:20:11Z", "seed": 0,
        "target": "llama.cpp", "effort": "balanced",
        "command": "rarefy compress gemma-3-270m --to 160MB --for llama.cpp -o out",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "xllamacpp": "2026.10.11549"},
        "inputs": [{"path": "gemma-3-270m-q4_k_m.gguf", "sha256": "4f" * 32, "bytes": 253_100_000}],
        "outputs": [{"path": "model.gguf", "sha256": "a1" * 32,
                     "bytes": sum(r["bytes"] for r in rows) + 9_300_000}],
        "model": {"name": "gemma-3-270m", "family": "gemma3_text", "parameters": 268_098_176,
                  "weights": 268_042_240, "blocks": 18, "tied": True, "original_bytes": 543_000_000},
        "budget": {"to": "160MB", "max_kl": None, "limit_bytes": 160_000_000},
        "data": {"calibration": "the model's own samples", "evaluation": "python-docs", "second": ""},
        "plan": rows, "sites": [step(r) for r in rows], "predicted_kl": 0.0874, "measured": measured(),
        "speed": {"original": {"prefill": 420.0, "decode": 25.2},
                  "compressed": {"prefill": 497.0, "decode": 60.8},
                  "ratio_decode": 2.41, "ratio_prefill": 1.18, "drift": 0.04,
                  "memory_original": {"resident": 742_000_000},
                  "memory_compressed": {"resident": 301_000_000}},
        "memory": {"peak_rss_bytes": 2_310_000_000, "runtime_rss_bytes": 301_000_000},
        "seconds": {"load": 6.1, "calibrate": 148.2, "plan": 41.0, "quantize": 402.5, "export": 5.2,
                    "measure": 133.9},
        "completions": completions(),
        "warnings": ["gemma-3-270m is a Q4_K_M file: it was dequantized, so the original here is that file"],
        "how_to_run": ["llama-cli -m out/model.gguf -p \"Once upon a time\"", "rarefy chat out"],
    }
