"""Do imports point down the layer list, and does no library code read the environment?"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "magi_attention"

# Every module (or folder) of the package and the ones it may import: each list is complete.
LAYERS = {
    "mask": set(),
    "jit": set(),
    "reference": {"mask"},
    "ops": {"mask", "jit"},
    "plan": {"mask", "ops"},
    "dist": {"mask", "ops", "plan"},
    "api": {"mask", "ops", "plan", "dist"},
    "__init__": {"api"},
    "integrations": {"api"},
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """Layers that a file names in its import statements, at any depth; a folder may import itself."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "magi_attention"
                else [node.module]
            )
        else:
            continue
        layers |= {
            name.split(".")[1] if "." in name else "__init__"
            for name in names
            if name.split(".")[0] == "magi_attention"
        }
    return layers - {layer_of(path)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert layer_of(path) in LAYERS, f"{path} belongs to no layer"
    assert imported_layers(path) <= LAYERS[layer_of(path)]


TORCH = re.compile(r"#include\s*[<\"](torch|ATen|c10)/")
INCLUDE = re.compile(r"#include\s*\"(\w+)/([\w.]+)\"")


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.c*")]), ids=lambda p: str(p.relative_to(ROOT))
)
def test_includes_point_down(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    text = path.read_text()
    if folder not in ("ops", "cpu"):
        assert not TORCH.search(text), "torch headers belong in csrc/ops and csrc/cpu"
    allowed = {"ops": {"ops", "cpu", "cuda", "plan"}}.get(folder, {folder})
    included = set(INCLUDE.findall(text))
    if folder == "cuda":
        # The plain argument structs that launchers fill and kernels read.
        included -= {("kernels", "args.cuh"), ("kernels", "ffa_bwd.cuh")}
    assert {name for name, _ in included} <= allowed


@pytest.mark.parametrize("folder", ["src", "csrc"])
def test_no_environment_variable_is_read(folder):
    reads = re.compile(r"\bgetenv\b|\bos\.environ\b|\benviron\b|\bgetenvb\b")
    found = [
        str(p)
        for p in (ROOT / folder).rglob("*")
        if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and reads.search(p.read_text())
    ]
    assert not found
