"""crates/peers/gpu-library from Python: builds it, loads it, and makes calls over torch's tensors."""

import ctypes, glob, os, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PEERS = os.path.join(ROOT, "crates", "peers")


def built_library():
    """Builds the library as users do and gives its path."""
    target = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "peers")
    rc = subprocess.call(["cargo", "build", "--release", "--locked", "--quiet", "--package", "gpu-library",
                          "--target-dir", target], cwd=PEERS)
    if rc:
        raise SystemExit("gpu-bench: the library could not be built")
    return os.path.join(target, "release", "libmlx_flash_attn_gpu.so")


def find_nvrtc():
    """Names NVRTC of torch's wheels to the library, unless a variable does."""
    if "MLX_FLASH_NVRTC" in os.environ:
        return
    for base in sys.path:
        for name in ("/nvidia/cu13/lib", "/nvidia/cuda_nvrtc/lib"):
            for path in sorted(glob.glob(base + name + "/libnvrtc.so.*")):
                if ".alt." not in path:
                    os.environ["MLX_FLASH_NVRTC"] = path
                    return


class Library:
    """The C interface of crates/peers/gpu-library."""

    def __init__(self, path):
        try:
            self.c = ctypes.CDLL(path)
        except OSError as e:
            raise SystemExit("gpu-bench: %s" % e)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("error", ctypes.c_char_p, []), ("request_fields", ctypes.c_char_p, []),
            ("head_dims", size, [pointer, size]), ("class_tile", None, [size, pointer, pointer]),
            ("device_open", pointer, [size, ctypes.c_char_p]), ("call_new", pointer, [pointer, pointer]),
            ("call_launch", ctypes.c_int, [pointer, pointer]), ("call_wait", ctypes.c_int, [pointer]),
            ("call_free", None, [pointer])):
            function = getattr(self.c, "mfa_" + name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        kinds = dict(i64=ctypes.c_int64, u64=ctypes.c_uint64, f64=ctypes.c_double)
        fields = [line.split() for line in self.request_fields().decode().splitlines()]
        self.Request = type("Request", (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in fields]})
        self.devices = {}

    def dims(self):
        room = (ctypes.c_int64 * 64)()
        return list(room[: self.head_dims(room, 64)])

    def tile(self, d):
        rows, keys = ctypes.c_int64(), ctypes.c_int64()
        self.class_tile(d, ctypes.byref(rows), ctypes.byref(keys))
        return rows.value, keys.value

    def device(self, kernels="own"):
        """The GPU with the kernels of this name, opened once."""
        if kernels not in self.devices:
            self.devices[kernels] = self.device_open(0, kernels.encode())
            if not self.devices[kernels]:
                raise SystemExit("gpu-bench: no CUDA device: %s" % self.error().decode())
        return self.devices[kernels]

    def checked(self, result, failed):
        if result == failed:
            raise RuntimeError(self.error().decode())
        return result


class Call:
    """One prepared call. q, k, v, o: [B, H, L, D] views with any strides and contiguous rows. `classify`: each
    launch computes the tile classes first. `kernels`: as the device is opened."""

    def __init__(self, library, q, k, v, o, causal=False, q_off=0, window=None, window_right=None, scale=None,
                 softcap=0.0, lse=None, mask=None, classes=None, classify=False, sinks=None, slopes=None,
                 kernels="own"):
        import torch

        codes = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4, torch.uint8: 4}
        pointer = lambda t: 0 if t is None else t.data_ptr()
        limit = lambda n: -1 if n is None else n
        r = library.Request(
            dtype=codes[q.dtype], batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], query_len=q.shape[2],
            key_len=k.shape[2], head_dim=q.shape[3], causal=int(causal), query_offset=q_off, window=limit(window),
            window_right=limit(window_right), scale=scale or 0.0, softcap=softcap, q=pointer(q), k=pointer(k),
            v=pointer(v), out=pointer(o), lse=pointer(lse), sinks=pointer(sinks), slopes=pointer(slopes),
            mask=pointer(mask), classes=pointer(classes), classify=int(classify))
        for name, t in ("q", q), ("k", k), ("v", v), ("out", o):
            for axis, stride in zip(("batch", "head", "row"), t.stride()):
                setattr(r, "%s_%s" % (name, axis), stride)
        if mask is not None:
            r.mask_dtype = codes[mask.dtype]
            for i, axis in enumerate(("batch", "head", "row")):
                setattr(r, "mask_" + axis, mask.stride(i) if mask.shape[i] > 1 else 0)
        self.library, self.stream = library, torch.cuda.current_stream().cuda_stream
        self.keep = [q, k, v, o, lse, mask, classes, sinks, slopes]
        self.call = library.checked(library.call_new(library.device(kernels), ctypes.byref(r)), None)

    def __call__(self):
        self.library.checked(self.library.call_launch(self.call, self.stream), -1)

    def wait(self):
        self.library.checked(self.library.call_wait(self.call), -1)

    def __del__(self):
        if getattr(self, "call", None):
            self.library.call_free(self.call)
