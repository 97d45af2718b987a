"""all-mpnet-base-v2 in float64 NumPy, from its published definition: what the scripts here check by.

`enter_venv` comes first: what needs NumPy imports it when called.
"""

import importlib.machinery
import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
NAME = "all-mpnet-base-v2"


def enter_venv(script):
    """Go on under a Python that has NumPy: this one, or a venv in the cache."""
    try:
        import numpy  # noqa: F401

        return
    except ImportError:
        pass
    venv = CACHE / "venv"
    python = venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if Path(sys.prefix) == venv:
        sys.exit(f"NumPy cannot be imported in {venv}")
    if not python.exists():
        subprocess.check_call([sys.executable, "-m", "venv", str(venv)])
    subprocess.check_call([str(python), "-m", "pip", "install", "--quiet", "numpy>=1.24"])
    sys.exit(subprocess.call([str(python), script, *sys.argv[1:]]))


def fetch():
    """The model's folder, fetched and checked."""
    path = str(ROOT / "scripts" / "fetch-models")
    loader = importlib.machinery.SourceFileLoader("fetch_models", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fetch_models", loader))
    loader.exec_module(module)
    return module.fetch(NAME, module.CACHE)


class Weights:
    """The float32 tensors of model.safetensors by name, as float64."""

    def __init__(self, folder):
        self.path = folder / "model.safetensors"
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self.header = json.loads(file.read(length))
        self.start = 8 + length

    def __getitem__(self, name):
        import numpy as np

        entry = self.header[name]
        assert entry["dtype"] == "F32", name
        start, end = entry["data_offsets"]
        data = np.fromfile(self.path, "<f4", count=(end - start) // 4, offset=self.start + start)
        return data.reshape(entry["shape"]).astype(np.float64)


def tokenise(text, vocab):
    """WordPiece over lower-case ASCII, between <s> and </s>."""
    assert text.isascii()
    tokens = ["<s>"]
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()):
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in vocab), None)
            if end is None:
                sys.exit(f"no token for {word!r}")
            tokens.append(prefix + word[start:end])
            start = end
    return tokens + ["</s>"]


def bucket(relative, buckets=32, max_distance=128):
    """The bias table's row for a key `relative` places after the query.

    Half of the rows serve each direction; of a half, the first rows hold one distance each and the
    rest widen logarithmically up to `max_distance`. Powers in place of logarithms keep it exact.
    """
    half = buckets // 2
    exact = half // 2
    steps = half - exact
    distance = abs(relative)
    if distance < exact:
        row = distance
    else:
        # The most steps s with (distance / exact) ** steps >= (max_distance / exact) ** s.
        reach = distance**steps
        row = exact + max(s for s in range(steps) if reach * exact**s >= max_distance**s * exact**steps)
    return row + (half if relative > 0 else 0)


class Model:
    """The encoder, one text at a time."""

    def __init__(self, folder):
        self.weights = Weights(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.ids = {t: i for i, t in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))}
        self.heads = self.config["num_attention_heads"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        import numpy as np

        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed_tokens(self, tokens):
        """What goes into layer 0, `[L, hidden]`."""
        # Positions count from the padding id, which no token here has.
        first = self.config["pad_token_id"] + 1
        x = self.weights["embeddings.word_embeddings.weight"][[self.ids[t] for t in tokens]]
        x = x + self.weights["embeddings.position_embeddings.weight"][first : first + len(tokens)]
        return self.norm(x, "embeddings.LayerNorm")

    def bias(self, length):
        """The relative-position bias, `[H, L, L]`."""
        buckets = self.config["relative_attention_num_buckets"]
        rows = [[bucket(j - i, buckets) for j in range(length)] for i in range(length)]
        return self.weights["encoder.relative_attention_bias.weight"][rows].transpose(2, 0, 1)

    def heads_of(self, x, layer, part):
        """A layer's q, k or v, `[H, L, D]`."""
        y = self.linear(x, f"encoder.layer.{layer}.attention.attn.{part}")
        return y.reshape(len(x), self.heads, -1).transpose(1, 0, 2)

    def sentence(self, text):
        """The sentence's embedding: the mean of its tokens' last states, of length 1."""
        import numpy as np

        tokens = tokenise(text, self.ids)
        x, bias = self.embed_tokens(tokens), self.bias(len(tokens))
        for n in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{n}"
            q, k, v = (self.heads_of(x, n, part) for part in "qkv")
            y = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + bias) @ v
            y = self.linear(y.transpose(1, 0, 2).reshape(len(tokens), -1), f"{layer}.attention.attn.o")
            x = self.norm(x + y, f"{layer}.attention.LayerNorm")
            y = self.linear(gelu(self.linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = self.norm(x + y, f"{layer}.output.LayerNorm")
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)


def softmax(scores):
    import numpy as np

    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def gelu(x):
    import math

    import numpy as np

    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
