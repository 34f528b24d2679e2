"""ParlAI's ranking models restated plainly: one text, one token, one head at a time, from the original's own files.

The slow twin of `poly_encoders.parlai`. It shares no code with it, takes nothing from `tokenizers` or `transformers`,
and is held against what the original implementation printed (test_original.py), so that it can stand in for the
original where there is no such print.
"""

import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parlai"


class Original:
    """A checkpoint as ParlAI reads it."""

    def __init__(self, folder: Path) -> None:
        self.opt = json.loads((folder / "model.opt").read_text())
        self.weights = {
            name: tensor.double() for name, tensor in torch.load(folder / "model", weights_only=True)["model"].items()
        }
        special = [self.opt[f"dict_{name}token"] for name in ("null", "start", "end", "unk")]
        self.ids: dict[str, int] = {}
        for token in special + [line.split("\t")[0] for line in (folder / "model.dict").read_text().splitlines()]:
            self.ids.setdefault(token, len(self.ids))
        self.null, self.start, self.end, self.unk = (self.ids[token] for token in special)
        lines = (folder / "model.dict.codecs").read_text().splitlines()[1:]
        self.ranks = {tuple(line.split(" ")): rank for rank, line in reversed(list(enumerate(lines)))}

    # --- text to ids ------------------------------------------------------------------------------------------------

    def merged(self, word: str) -> list[str]:
        """subword-nmt: merge the best pair of neighbours, everywhere, until no pair is known."""
        symbols = [*word[:-1], word[-1] + "</w>"]
        while True:
            known = [pair for pair in pairwise(symbols) if pair in self.ranks]
            if not known:
                break
            left, right = min(known, key=self.ranks.__getitem__)
            merged, position = [], 0
            while position < len(symbols):
                if symbols[position : position + 2] == [left, right]:
                    merged.append(left + right)
                    position += 2
                else:
                    merged.append(symbols[position])
                    position += 1
            symbols = merged
        return [symbol + "@@" for symbol in symbols[:-1]] + [symbols[-1].removesuffix("</w>")]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without start and end."""
        text = (text.lower() if self.opt["dict_lower"] else text).replace("\n", " __newln__ ")
        words = re.findall(r"\w+|[^\w\s]", text)
        return [self.ids.get(token, self.unk) for word in words for token in self.merged(word)]

    def context_ids(self, turns: list[str]) -> list[int]:
        """Ids of a context, oldest turn first."""
        if self.opt["history_size"] > 0:
            turns = turns[-self.opt["history_size"] :]
        ids: list[int] = []
        for position, turn in enumerate(turns):
            ids += (self.text_ids(self.opt["delimiter"]) if position else []) + self.text_ids(turn)
        limit = self._limit("text_truncate")
        kept = ids if limit is None else ids[len(ids) - min(limit, len(ids)) :]
        return [self.start, *kept, self.end]

    def candidate_ids(self, text: str) -> list[int]:
        """Ids of a candidate."""
        return [self.start, *self.text_ids(text), self.end][: self._limit("label_truncate")]

    def _limit(self, name: str) -> int | None:
        value = self.opt[name] or self.opt["truncate"]
        return None if value < 0 else value

    # --- ids to vectors ---------------------------------------------------------------------------------------------

    def hidden(self, prefix: str, ids: list[int], segments: list[int] | None = None) -> Tensor:
        """One text's scaled hidden states, `(length, dim)` float64."""
        w, heads = self.weights, self.opt["n_heads"]
        words = w[f"{prefix}.embeddings.weight"][ids]
        dim = words.shape[1]
        x = words * (math.sqrt(dim) if self.opt["embeddings_scale"] else 1.0)
        x = x + w[f"{prefix}.position_embeddings.weight"][: len(ids)]
        if f"{prefix}.segment_embeddings.weight" in w:
            x = x + w[f"{prefix}.segment_embeddings.weight"][segments or [0] * len(ids)]
        x = self._norm(x, f"{prefix}.norm_embeddings")
        layer = 0
        while f"{prefix}.layers.{layer}.norm1.weight" in w:
            name = f"{prefix}.layers.{layer}"
            q, k, v = (self._linear(x, f"{name}.attention.{part}_lin") for part in "qkv")
            size = dim // heads
            mixed = torch.empty_like(x)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                weights = (q[:, part] / math.sqrt(size) @ k[:, part].T).softmax(dim=-1)
                mixed[:, part] = weights @ v[:, part]
            x = self._norm(x + self._linear(mixed, f"{name}.attention.out_lin"), f"{name}.norm1")
            inner = self._linear(x, f"{name}.ffn.lin1")
            inner = torch.nn.functional.gelu(inner) if self.opt["activation"] == "gelu" else inner.relu()
            x = self._norm(x + self._linear(inner, f"{name}.ffn.lin2"), f"{name}.norm2")
            layer += 1
        return x * self.opt["output_scaling"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred * centred).mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def reduced(self, hidden: Tensor) -> Tensor:
        return hidden[0] if self.opt["reduction_type"] == "first" else hidden.mean(dim=0)

    # --- scores -----------------------------------------------------------------------------------------------------

    def score(self, turns: list[str], candidate: str) -> float:
        """The score of one candidate for one context."""
        context, label = self.context_ids(turns), self.candidate_ids(candidate)
        if self.opt["model"].startswith("transformer/crossencoder"):
            segments = [0] * len(context) + [1] * len(label)
            pair = self.reduced(self.hidden("encoder", context + label, segments))
            return float(self._linear(pair, "linear_layer"))
        if self.opt["model"].startswith("transformer/biencoder"):
            left = self.reduced(self.hidden("context_encoder", context))
            return float(left @ self.reduced(self.hidden("cand_encoder", label)))
        vectors = self.context_vectors(context)
        x = self.reduced(self.hidden("encoder_cand", label))
        weights = (vectors @ x * self._scale("poly_attention_type")).softmax(dim=0)
        return float((weights @ vectors) @ x)

    def context_vectors(self, ids: list[int]) -> Tensor:
        """A context's vectors, `(m, dim)`, or fewer where it is shorter than the first m."""
        hidden = self.hidden("encoder_ctxt", ids)
        if self.opt["polyencoder_type"] == "n_first":
            return hidden[: self.opt["poly_n_codes"]]
        logits = self.weights["codes"] @ hidden.T * self._scale("codes_attention_type")
        return logits.softmax(dim=-1) @ hidden

    def _scale(self, name: str) -> float:
        return self.opt["embedding_size"] ** -0.5 if self.opt[name] == "sqrt" else 1.0


def write_checkpoint(
    folder: Path, kind: str = "poly", dtype: torch.dtype = torch.float32, seed: int = 0, **options: object
) -> Path:
    """A random checkpoint in ParlAI's format with these options, on the fixtures' dictionary; its model file.

    The weights are those that ParlAI's agent of this kind would save for these options.
    """
    fixture = FIXTURES / {"poly": "poly_codes8", "bi": "bi_mean", "cross": "cross_first"}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    opt = {"rows": 116} | json.loads((fixture / "model.opt").read_text()) | options
    (folder / "model.opt").write_text(json.dumps(opt))
    for name in ("model.dict", "model.dict.codecs"):
        (folder / name).write_text((fixture / name).read_text())
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    if kind == "poly" and opt["polyencoder_type"] == "codes":
        state["codes"] = torch.randn(opt["poly_n_codes"], opt["embedding_size"], generator=generator)
    prefixes = {"poly": "encoder_ctxt encoder_cand", "bi": "context_encoder cand_encoder", "cross": "encoder"}
    for prefix in prefixes[kind].split():
        segments = opt["n_segments"] if kind == "bi" else 2  # as the agents have it
        state |= _encoder(prefix, opt, segments, generator)
    if kind == "bi":
        state["embeddings.weight"] = state["context_encoder.embeddings.weight"]
        if opt["share_word_embeddings"]:
            state["cand_encoder.embeddings.weight"] = state["embeddings.weight"]
        else:
            state["cand_embeddings.weight"] = state["cand_encoder.embeddings.weight"]
        for name in [name for name in state if name.startswith("context_encoder.")]:
            state[name.replace("context_encoder", "memory_transformer")] = state[name]
    if kind == "cross":
        state["linear_layer.weight"] = torch.randn(1, opt["embedding_size"], generator=generator)
        state["linear_layer.bias"] = torch.randn(1, generator=generator)
    torch.save({"model": {name: tensor.to(dtype) for name, tensor in state.items()}}, folder / "model")
    return folder / "model"


def _encoder(prefix: str, opt: dict, segments: int, generator: torch.Generator) -> dict[str, Tensor]:
    dim, inner = opt["embedding_size"], opt["ffn_size"]

    def random_(*shape: int, around: float = 0.0, by: float = 0.3) -> Tensor:
        return around + by * torch.randn(*shape, generator=generator)

    state = {
        "embeddings.weight": random_(opt["rows"], dim, by=1.0 / (dim**0.5 if opt["embeddings_scale"] else 1.0)),
        "position_embeddings.weight": random_(opt["n_positions"], dim),
        "norm_embeddings.weight": random_(dim, around=1.0),
        "norm_embeddings.bias": random_(dim),
    }
    if segments:
        state["segment_embeddings.weight"] = random_(segments, dim)
    for layer in range(opt["n_layers"]):
        shapes = {f"attention.{part}_lin": (dim, dim) for part in ("q", "k", "v", "out")}
        shapes |= {"ffn.lin1": (inner, dim), "ffn.lin2": (dim, inner)}
        for part, shape in shapes.items():
            state[f"layers.{layer}.{part}.weight"] = random_(*shape, by=shape[1] ** -0.5)
            state[f"layers.{layer}.{part}.bias"] = random_(shape[0])
        for part in ("norm1", "norm2"):
            state[f"layers.{layer}.{part}.weight"] = random_(dim, around=8.0 if part == "norm2" else 1.0)
            state[f"layers.{layer}.{part}.bias"] = random_(dim)
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


_SAMPLE_WORDS = """
hi hello HELLO there ! ? . , ; : your persona i have two cats green tea museum a_b 4x4 1,000.5 don't Zürich & sushi
__start__ __end__ __unk__ __null__x _ __ ___ t to you unk star the\u0301 ΟΔΟΣ 日本 emoji🙂
"""


def sample_text(rng: random.Random, longest: int = 40) -> str:
    """A text of the fixtures' words and of some that they never saw."""
    words = [*_SAMPLE_WORDS.split(), "\n"]
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, longest)))
