"""How does device code become kernels? NVRTC compiles csrc/kernels to cubins, at first use or ahead of time.

    python -m magi_attention.jit build              # every variant, into the per-user cache
    python -m magi_attention.jit build --out DIR    # into DIR; the package's `cubins` folder is found by itself
    python -m magi_attention.jit list

Compiling needs `cuda-bindings` and `nvidia-cuda-nvrtc` (in CUDA builds of torch already), no GPU and no nvcc. A cubin
is named after its variant and a digest of everything that shaped it (device sources, options), so a stale one is never
loaded and versions share a cache.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
PACKAGED = PACKAGE / "cubins"
CACHE = Path.home() / ".cache" / "magi_attention"
OPTIONS = ("--gpu-architecture=sm_90a", "-std=c++20", "--use_fast_math", "--ptxas-options=-v")


@dataclass(frozen=True)
class Variant:
    """One compiled kernel file: its source under csrc/kernels and the macros that shape it."""

    name: str
    source: str
    defines: tuple[tuple[str, str], ...] = ()
    max_registers: int = 255  # what the launch bounds allow; the tests hold every kernel to it


def _forward_variants() -> list[Variant]:
    # kForwardShapes in args.cuh: head_dim, v_dim, rows
    shapes = ((64, 64, 192), (64, 64, 128), (128, 128, 128), (192, 128, 128), (192, 192, 128), (256, 256, 128))
    return [
        Variant(
            f"ffa_fwd_d{dim}_v{v_dim}_r{rows}_{dtype}{'_transform' if transform else ''}",
            "ffa_fwd.cu",
            (
                ("HEAD_DIM", str(dim)),
                ("V_DIM", str(v_dim)),
                ("ROWS", str(rows)),
                ("ELEMENT", dtype),
                ("TRANSFORM", str(transform)),
            ),
            65536 // (128 + 2 * rows) // 8 * 8,  # two threads a row, and the producer's 128
        )
        for dim, v_dim, rows in shapes
        for dtype in ("bf16", "f16")
        for transform in (0, 1)  # softcap, a softmax_scale that is not positive, or max_logits
    ]


def _backward_variants() -> list[Variant]:
    return [
        Variant(
            f"ffa_bwd_d{dim}_{dtype}{'_softcap' if softcap else ''}{kind}",
            "ffa_bwd.cu",
            (
                ("HEAD_DIM", str(dim)),
                ("ELEMENT", dtype),
                ("SOFTCAP", str(softcap)),
                ("DETERMINISTIC", str(int("_ordered" in kind))),
                ("ROWS", str((128 if dim == 64 else 80) if "_tall" in kind else 64)),  # backward_rows in ffa_bwd.cuh
            ),
            168,
        )
        for dim in (64, 128)
        for dtype in ("bf16", "f16")
        for softcap in (0, 1)
        for kind in ("", "_ordered", *([] if softcap else ["_tall", "_ordered_tall"]))
    ]


def _wide_backward_variants() -> list[Variant]:
    return [
        Variant(
            f"ffa_bwd_d{dim}_v{v_dim}_{dtype}{'_softcap' if softcap else ''}{'_ordered' if deterministic else ''}",
            "ffa_bwd_wide.cu",
            (
                ("SHAPE", str(shape)),
                ("ELEMENT", dtype),
                ("SOFTCAP", str(softcap)),
                ("DETERMINISTIC", str(deterministic)),
            ),
            168,
        )
        for shape, (dim, v_dim) in enumerate(((192, 128), (192, 192), (256, 256)))  # kBackwardWideShapes in ffa_bwd.cuh
        for dtype in ("bf16", "f16")
        for softcap in (0, 1)
        for deterministic in (0, 1)
    ]


# The whole variant space, in one place. Host launchers ask for these names.
VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in [
        Variant("tiles", "tiles.cu"),
        Variant("rows", "rows.cu"),
        *_forward_variants(),
        Variant("ffa_bwd_rows", "ffa_bwd_rows.cu"),
        *_backward_variants(),
        *_wide_backward_variants(),
    ]
}


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    log: str
    seconds: float

    @property
    def spills(self) -> int:
        """Bytes of register spills, stores and loads together, over all kernels of the file."""
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", self.log))

    @property
    def registers(self) -> int:
        """Registers a thread at entry, the most over all kernels of the file."""
        return max(int(n) for n in re.findall(r"Used (\d+) registers", self.log))


def compile_variant(variant: Variant) -> Compiled:
    """Compile one variant; raises RuntimeError with the compiler's log. No GPU needed."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as e:
        raise RuntimeError(
            f"compiling kernel {variant.name} needs cuda-bindings and nvidia-cuda-nvrtc (pip install both), or cubins "
            f"made elsewhere with `python -m magi_attention.jit build --out DIR` and copied to {PACKAGED}"
        ) from e

    source = SOURCES / "kernels" / variant.source
    options = [*OPTIONS, f"-I{SOURCES}", f"-I{SOURCES / 'kernels'}", *(f"-D{k}={v}" for k, v in variant.defines)]

    def ok(result, what: str):
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{what} of kernel {variant.name} failed: {result[0].name}\n{log() if program else ''}")
        return result[1] if len(result) > 1 else None

    def log() -> str:
        _, n = nvrtc.nvrtcGetProgramLogSize(program)
        text = bytes(n + 1)  # filled in place
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.decode(errors="replace").strip("\0 \n")

    program = None
    program = ok(nvrtc.nvrtcCreateProgram(source.read_bytes(), str(source).encode(), 0, [], []), "creation")
    start = time.perf_counter()
    ok(nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options]), "compilation")
    seconds = time.perf_counter() - start
    size = ok(nvrtc.nvrtcGetCUBINSize(program), "reading")
    cubin = bytes(size + 1)  # one byte more: a bytes object of length 1 would be shared
    ok(nvrtc.nvrtcGetCUBIN(program, cubin), "reading")
    result = Compiled(cubin[:size], log(), seconds)
    nvrtc.nvrtcDestroyProgram(program)
    return result


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(SOURCES / "kernels").iterdir(), SOURCES / "band.h"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def file_name(variant: Variant) -> str:
    """Name of the variant's cubin: a digest of sources, options and macros tells versions apart."""
    digest = hashlib.sha256(repr((_source_digest(), OPTIONS, variant.defines)).encode()).hexdigest()
    return f"{variant.name}-{digest[:16]}.cubin"


def load_or_compile(variant: Variant, cache: Path = CACHE) -> bytes:
    """The variant's cubin: from the package, the cache, or compiled into the cache; safe with many processes."""
    name = file_name(variant)
    for folder in (PACKAGED, cache):
        if (folder / name).is_file():
            return (folder / name).read_bytes()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"):
        if (cache / name).is_file():  # another process was first
            return (cache / name).read_bytes()
        print(f"magi_attention: compiling kernel {variant.name} (first use) ...", file=sys.stderr, flush=True)
        cubin = compile_variant(variant).cubin
        _write(cache / name, cubin)
        return cubin


class _locked:
    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        import fcntl

        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
        f.write(data)
    Path(f.name).chmod(0o644)
    os.replace(f.name, path)


_kept: list[object] = []  # what the library holds on to


def attach(library: Path) -> None:
    """Give the CUDA library its hook: a kernel it lacks is looked up by name, compiled if need be, and handed over."""
    door = ctypes.CDLL(str(library))
    door.magi_cuda_add_cubin.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    door.magi_cuda_add_cubin.restype = None

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def on_missing(name: bytes) -> None:
        # An exception cannot cross C: it is shown here, and the library then reports the kernel as missing.
        try:
            cubin = load_or_compile(VARIANTS[name.decode()])
            door.magi_cuda_add_cubin(name, cubin, len(cubin))
        except Exception as e:
            print(f"magi_attention: {e}", file=sys.stderr, flush=True)

    _kept.extend((door, on_missing))
    door.magi_cuda_on_missing.argtypes = [ctypes.c_void_p]
    door.magi_cuda_on_missing.restype = None
    door.magi_cuda_on_missing(on_missing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m magi_attention.jit", description="Compile the CUDA kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile every variant")
    build.add_argument("--out", type=Path, default=CACHE, help=f"folder for the cubins (default {CACHE})")
    commands.add_parser("list", help="name every variant")
    args = parser.parse_args()
    for variant in VARIANTS.values():
        if args.command == "list":
            print(variant.name)
            continue
        target = args.out / file_name(variant)
        if target.is_file():
            print(f"{variant.name:32s} there already")
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        made = compile_variant(variant)
        _write(target, made.cubin)
        print(f"{variant.name:32s} {made.seconds:5.1f} s, {made.registers} registers, {made.spills} bytes spilled")


if __name__ == "__main__":
    main()
