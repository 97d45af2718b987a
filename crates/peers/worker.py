"""Runs one Python peer for the benchmark `peers`: worker.py torch|ort|ggml THREADS.

Speaks the protocol of src/protocol.rs on stdin and stdout. It sleeps while it waits, and keeps each
library's own defaults while it runs.
"""

import ctypes
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable

# What peers that are fed from numpy are asked for; it has no bf16.
NUMPY_DTYPES = ("f32", "f16")


@dataclass
class Variant:
    """One way of a peer to compute a row."""

    name: str
    dtype: str
    run: Callable[[], Any]
    # The last output as a numpy array, f32 [B, H, Sq, D].
    output: Callable[[], Any]


@dataclass
class Row:
    """A row of the table: its shape and masks, and the dtypes asked for."""

    path: str
    shape: list
    causal: bool
    window: int | None
    dtypes: list

    def visible(self, np):
        """The row's mask, [Sq, Sk], true where a query sees a key."""
        _, _, _, sq, sk, _ = self.shape
        distance = np.arange(sq)[:, None] - np.arange(sk)[None, :]
        seen = distance >= 0 if self.causal else np.ones((sq, sk), bool)
        return seen & (distance < self.window) if self.window else seen

    def operands(self, framework, dtype):
        """q, k, v, head-major."""
        from safetensors import safe_open

        with safe_open(self.path, framework=framework) as file:
            return [file.get_tensor(f"{name}_{dtype}") for name in "qkv"]


class Torch:
    """torch.nn.functional.scaled_dot_product_attention."""

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.version = torch, torch.__version__

    def variants(self, row):
        """Native in each dtype; a window can only be said as a mask."""
        torch = self.torch
        _, heads, kv_heads, _, _, _ = row.shape
        for dtype in row.dtypes:
            options = {"enable_gqa": heads != kv_heads}
            if row.window:
                import numpy

                options["attn_mask"] = torch.from_numpy(row.visible(numpy))
            else:
                options["is_causal"] = row.causal
            yield "sdpa, bool mask" if row.window else "sdpa", dtype, functools.partial(
                self.build, row, dtype, options
            )

    def build(self, row, dtype, options):
        operands = row.operands("pt", dtype)
        attention = self.torch.nn.functional.scaled_dot_product_attention
        result = []

        def run():
            result[:] = [attention(*operands, **options)]

        return run, lambda: result[0].float().contiguous().numpy()


class Ort:
    """ONNX Runtime: its own two operators, which are seq-major, and ONNX Attention."""

    def __init__(self, threads):
        import numpy
        import onnx
        import onnxruntime

        self.np, self.onnx, self.ort = numpy, onnx, onnxruntime
        self.version = onnxruntime.__version__
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.log_severity_level = 3

    def variants(self, row):
        for dtype in row.dtypes:
            if dtype not in NUMPY_DTYPES:
                continue
            if not row.window:
                yield "MultiHeadAttention", dtype, functools.partial(self.mha, row, dtype)
            if row.causal:
                yield "GroupQueryAttention", dtype, functools.partial(self.gqa, row, dtype)
            yield "Attention", dtype, functools.partial(self.attention, row, dtype)

    def mha(self, row, dtype):
        """Knows no grouped heads: K and V are repeated beforehand."""
        _, heads, kv_heads, _, _, _ = row.shape
        q, k, v = row.operands("np", dtype)
        k, v = (x.repeat(heads // kv_heads, axis=1) for x in (k, v))
        inputs = [("q", seq_major(q)), ("k", seq_major(k)), ("v", seq_major(v))]
        attributes = {"num_heads": heads, "unidirectional": int(row.causal)}
        return self.session(row, "MultiHeadAttention", "com.microsoft", inputs, attributes)

    def gqa(self, row, dtype):
        """Writes the keys and values that a next step would need, too."""
        batch, heads, kv_heads, _, sk, _ = row.shape
        np = self.np
        inputs = [(name, seq_major(x)) for name, x in zip("qkv", row.operands("np", dtype))]
        # No past keys and values.
        inputs += [("", None), ("", None)]
        inputs.append(("last", np.full(batch, sk - 1, np.int32)))
        inputs.append(("total", np.array(sk, np.int32)))
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads}
        if row.window:
            attributes["local_window_size"] = row.window
        return self.session(
            row, "GroupQueryAttention", "com.microsoft", inputs, attributes, ["present_k", "present_v"]
        )

    def attention(self, row, dtype):
        inputs = list(zip("qkv", row.operands("np", dtype)))
        if row.window:
            inputs.append(("mask", row.visible(self.np)))
        attributes = {} if row.window else {"is_causal": int(row.causal)}
        return self.session(row, "Attention", "", inputs, attributes)

    def session(self, row, operator, domain, inputs, attributes, more_outputs=()):
        """A model of one operator, bound to inputs and outputs that stay where they are."""
        batch, heads, kv_heads, sq, sk, dim = row.shape
        helper = self.onnx.helper
        numpy_type = inputs[0][1].dtype
        element = helper.np_dtype_to_tensor_dtype(numpy_type)
        shapes = {"o": (batch, sq, heads * dim) if domain else (batch, heads, sq, dim)}
        shapes |= {name: (batch, kv_heads, sk, dim) for name in more_outputs}
        given = [(name, x) for name, x in inputs if name]
        node = helper.make_node(
            operator, [name for name, _ in inputs], list(shapes), domain=domain, **attributes
        )
        graph = helper.make_graph(
            [node],
            operator,
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for name, x in given
            ],
            [helper.make_tensor_value_info(name, element, shape) for name, shape in shapes.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        session = self.ort.InferenceSession(
            model.SerializeToString(), self.options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        value = self.ort.OrtValue.ortvalue_from_numpy
        values = {name: value(x) for name, x in given}
        outputs = {name: value(self.np.zeros(s, numpy_type)) for name, s in shapes.items()}
        for name, x in values.items():
            binding.bind_ortvalue_input(name, x)
        for name, x in outputs.items():
            binding.bind_ortvalue_output(name, x)

        def output():
            o = outputs["o"].numpy().astype(self.np.float32)
            return o.reshape(batch, sq, heads, dim).swapaxes(1, 2) if domain else o

        # The binding keeps no hold of what it binds.
        return lambda keep=values: session.run_with_iobinding(binding), output


class Ggml:
    """ggml_flash_attn_ext: queries and output f32, keys and values in the dtype."""

    def __init__(self, threads):
        import ggml
        import numpy

        self.ggml, self.np = ggml, numpy
        self.version = ggml.ggml_version().decode()
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def variants(self, row):
        for dtype in row.dtypes:
            if dtype in NUMPY_DTYPES:
                yield "flash_attn_ext", dtype, functools.partial(self.build, row, dtype)

    def build(self, row, dtype):
        ggml, np = self.ggml, self.np
        batch, heads, kv_heads, sq, sk, dim = row.shape
        q, _, _ = row.operands("np", "f32")
        rounded, k, v = row.operands("np", dtype)
        # The same queries as others get in this dtype.
        q[...] = rounded
        context = ggml.ggml_init(ggml.ggml_init_params(mem_size=1 << 20, mem_buffer=None, no_alloc=True))
        kv_type = ggml.GGML_TYPE_F32 if dtype == "f32" else ggml.GGML_TYPE_F16
        tensor = functools.partial(ggml.ggml_new_tensor_4d, context)
        operands = [
            (tensor(ggml.GGML_TYPE_F32, dim, sq, heads, batch), q),
            (tensor(kv_type, dim, sk, kv_heads, batch), k),
            (tensor(kv_type, dim, sk, kv_heads, batch), v),
        ]
        mask = None
        if row.causal or row.window:
            mask = tensor(ggml.GGML_TYPE_F16, sk, sq, 1, 1)
            hidden = np.where(row.visible(np), 0, -np.inf).astype(np.float16)
            operands.append((mask, hidden))
        out = ggml.ggml_flash_attn_ext(
            context, *(t for t, _ in operands[:3]), mask, 1 / math.sqrt(dim), 0.0, 0.0
        )
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        ggml.ggml_backend_alloc_ctx_tensors(context, self.backend)
        for to, x in operands:
            x = np.ascontiguousarray(x)
            ggml.ggml_backend_tensor_set(to, x.ctypes.data_as(ctypes.c_void_p), 0, x.nbytes)

        def output():
            o = np.zeros((batch, sq, heads, dim), np.float32)
            ggml.ggml_backend_tensor_get(out, o.ctypes.data_as(ctypes.c_void_p), 0, o.nbytes)
            return o.swapaxes(1, 2)

        return lambda: ggml.ggml_backend_graph_compute(self.backend, graph), output


PEERS = {"torch": Torch, "ort": Ort, "ggml": Ggml}


def seq_major(x):
    """[B, H, S, D] as [B, S, H * D]."""
    batch, heads, length, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * dim)


def load(peer, request):
    """What runs, and reasons for what does not."""
    row = Row(**{name: request[name] for name in ("path", "shape", "causal", "window", "dtypes")})
    variants, skipped = [], []
    for name, dtype, build in peer.variants(row):
        try:
            run, output = build()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if seconds > request["limit_s"]:
                raise RuntimeError(f"takes {seconds:.1f} s")
            variants.append(Variant(name, dtype, run, output))
        # Whatever a peer cannot do is told, and the others go on.
        except Exception as error:  # pylint: disable=broad-except
            skipped.append(f"{name} {dtype}: {str(error).strip().splitlines()[0]}")
    return variants, skipped


def measure(run, warm, iters):
    """Nanoseconds of each of `iters` runs."""
    for _ in range(warm):
        run()
    ns = []
    for _ in range(iters):
        start = time.perf_counter_ns()
        run()
        ns.append(time.perf_counter_ns() - start)
    return ns


def main():
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields):
        print(json.dumps(fields), file=replies, flush=True)

    try:
        peer = PEERS[sys.argv[1]](int(sys.argv[2]))
    except Exception as error:  # pylint: disable=broad-except
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(version=peer.version)
    variants = []
    while line := sys.stdin.readline():
        request = json.loads(line)
        try:
            match request["do"]:
                case "load":
                    # The row before goes first, so that two are never in memory.
                    variants = []
                    variants, skipped = load(peer, request)
                    told = [{"name": v.name, "dtype": v.dtype} for v in variants]
                    reply(variants=told, skipped=skipped)
                case "time":
                    run = variants[request["variant"]].run
                    reply(ns=measure(run, request["warm"], request["iters"]))
                case "output":
                    variants[request["variant"]].output().astype("<f4").tofile(request["path"])
                    reply()
        except Exception as error:  # pylint: disable=broad-except
            reply(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
