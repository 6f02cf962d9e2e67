"""How many bytes of KV cache a token of a well-known model has; see `models.json`.

Of its elements of two bytes, as bfloat16, and of all its layers, as LMCache stores
them; layers with a sliding window, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastkv.cli.terminal import Failure

_FILE = Path(__file__).with_name("models.json")
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Model:
    """The geometry of a KV cache.

    Attributes:
        name: As on the command line.
        token_bytes: Of K and V of all layers, or of the latent vector that stands for
            them (MLA).
        source: Where its figures are from.
    """

    name: str
    token_bytes: int
    source: str


def known_models() -> dict[str, Model]:
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    models = {}
    for name, shape in content["models"].items():
        if "kv_lora_rank" in shape:
            elements = shape["kv_lora_rank"] + shape["rope_head_dim"]
        else:
            elements = 2 * shape["kv_heads"] * shape["head_dim"]
        token_bytes = shape["layers"] * elements * _ELEMENT_BYTES
        models[name] = Model(name, token_bytes, content["sources"][shape["source"]])
    return models


def find_model(name: str) -> Model:
    """By its name, in any case. Raises `Failure`."""
    models = known_models()
    found = models.get(name.lower())
    if found is None:
        raise Failure(
            f"--model: {name!r} is not known; give --bytes-per-token, or one of "
            f"{', '.join(models)}"
        )
    return found
