"""``import rarefy.hf`` teaches transformers the native format.

    import rarefy.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("OUT")     # an ordinary Llama, Gemma, ..., weights decoded

A native folder says ``"model_type": "rarefy"``. That name is registered here with a configuration that
keeps the network's own, and with a class whose ``from_pretrained`` hands the folder to ``rarefy.load``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rarefy.core.errors import ModelError

# what AutoModelForCausalLM passes on its own account, and what means nothing for a local folder
IGNORED = frozenset({"config", "trust_remote_code", "local_files_only", "cache_dir", "force_download",
                     "revision", "code_revision", "token", "adapter_kwargs", "low_cpu_mem_usage",
                     "use_safetensors"})


class RarefyConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types
    """The configuration of a native folder; ``network`` is that of the model inside."""

    model_type = "rarefy"

    def __init__(self, network: dict[str, Any] | None = None, name: str = "", **rest: Any) -> None:
        super().__init__(**rest)
        self.network, self.name = network or {}, name


class RarefyForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """Never made itself: loading gives the network inside the folder."""

    config_class = RarefyConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, dtype: torch.dtype | str | None = None,
                        torch_dtype: torch.dtype | str | None = None, device_map: Any = None,
                        **settings: Any) -> Any:
        """The decoded network. ``dtype`` and a ``device_map`` that names one device are understood."""
        from rarefy.export.native import load

        unknown = sorted(set(settings) - IGNORED)
        if args or unknown or isinstance(device_map, dict):
            what = unknown[0] if unknown else "device_map" if isinstance(device_map, dict) else repr(args[0])
            raise ModelError(f"{folder}: the native format is loaded whole and knows no {what}; leave it out")
        wanted = dtype if dtype is not None else torch_dtype
        network = load(folder, dtype=_dtype(wanted))
        place = _device(device_map)
        return network if place is None else network.to(place)


def _dtype(wanted: torch.dtype | str | None) -> torch.dtype:
    if wanted is None or wanted == "auto":
        return torch.float32  # what decoding gives
    found: torch.dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    return found


def _device(wanted: Any) -> torch.device | None:
    """One device; "auto" takes the accelerator if there is one."""
    if wanted is None:
        return None
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator()
        return accelerator if accelerator is not None else torch.device("cpu")
    return torch.device(wanted)


AutoConfig.register(RarefyConfig.model_type, RarefyConfig, exist_ok=True)
AutoModelForCausalLM.register(RarefyConfig, RarefyForCausalLM, exist_ok=True)
