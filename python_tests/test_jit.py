"""Does every kernel variant compile, within its registers and without spills? Does the cache hold? No GPU needed."""

import dataclasses
import multiprocessing
import re

import pytest

from magi_attention import jit

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc (extra `test`)")


@pytest.mark.parametrize("name", jit.VARIANTS)
def test_variant_compiles_without_spills(name):
    variant = jit.VARIANTS[name]
    compiled = jit.compile_variant(variant)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.spills == 0, compiled.log
    assert compiled.registers <= variant.max_registers, compiled.log
    assert "setmaxnreg" not in compiled.log and "serializ" not in compiled.log, compiled.log  # ignored by ptxas


def test_variants_are_the_sizes_of_the_headers(tmp_path):
    """jit.py repeats the headers' shapes and backward_rows: compiled here, a size that differs is an error."""
    macros = [(name, dict(v.defines)) for name, v in jit.VARIANTS.items()]
    forward = {(m["HEAD_DIM"], m["V_DIM"], m["ROWS"]) for name, m in macros if name.startswith("ffa_fwd_")}
    checks = [f"sizeof(kForwardShapes) == {len(forward)} * sizeof(ForwardShape)"]
    for dim, v_dim, rows in forward:
        shape = f"forward_shape({dim}, {v_dim}, {rows})"
        checks.append(f"{shape}.head_dim == {dim} && {shape}.v_dim == {v_dim} && {shape}.rows() == {rows}")
    wide = {(m["SHAPE"], *re.match(r"ffa_bwd_d(\d+)_v(\d+)", name).groups()) for name, m in macros if "SHAPE" in m}
    checks.append(f"sizeof(kBackwardWideShapes) == {len(wide)} * sizeof(BackwardWideShape)")
    for shape, dim, v_dim in wide:
        row = f"kBackwardWideShapes[{shape}]"
        checks.append(f"{row}.head_dim == {dim} && {row}.v_dim == {v_dim}")
    for name, m in macros:
        if name.startswith("ffa_bwd_d") and "SHAPE" not in m:
            checks.append(f"backward_rows({m['HEAD_DIM']}, {'true' if '_tall' in name else 'false'}) == {m['ROWS']}")
    source = tmp_path / "sizes.cu"
    lines = [f'static_assert({check}, "{check}");' for check in checks]
    source.write_text('#include "ffa_bwd.cuh"\nusing namespace magi;\n' + "\n".join(lines))
    jit.compile_variant(jit.Variant("sizes", str(source)))


def test_error_shows_the_compilers_log():
    variant = jit.VARIANTS["ffa_fwd_d128_v128_r128_bf16"]
    broken = dataclasses.replace(variant, defines=tuple({**dict(variant.defines), "ELEMENT": "nothing"}.items()))
    with pytest.raises(RuntimeError, match='identifier "nothing" is undefined'):
        jit.compile_variant(broken)


def test_variants_with_other_macros_have_other_files():
    names = {jit.file_name(v) for v in jit.VARIANTS.values()}
    assert len(names) == len(jit.VARIANTS)


def compile_and_count(cache):
    cubin = jit.load_or_compile(jit.VARIANTS["tiles"], cache)
    return cubin[:4] == b"\x7fELF"


def test_processes_that_start_together_share_one_compilation(tmp_path, capfd):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.map(compile_and_count, [tmp_path / "cache"] * 3))
    assert capfd.readouterr().err.count("compiling kernel tiles") == 1
    assert [p.name for p in (tmp_path / "cache").glob("*.cubin")] == [jit.file_name(jit.VARIANTS["tiles"])]
