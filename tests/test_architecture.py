"""The way through the code goes one way: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte

PACKAGE = Path(halfbyte.__file__).parent
# Lowest first. A module imports from lower layers and from rows before it in its own.
LAYERS: dict[int, str] = {
    0: "shown errors formats affine",
    1: "ops model graph chains run moments store effects channels",
    2: "preprocess pictures loading opening batches data transforms.canonicalize transforms.fold_batchnorm transforms.equalize "
    "transforms.absorb_bias capture",
    3: "sessions engine targets overrides place",
    4: "stats grids transforms.rotate walk correct calibrate losses refine_ranges",
    5: "products second_moments local reparam methods.adaround methods.adaquant corrections descent reconstruct tune_statistics "
    "refinement blocks tune dual parts transforms.split_tensor",
    6: "units costs proxies sensitivity budgets programme allocate",
    8: "prove lower sizes sums engine_openvino engines integer parity parity_openvino ports provenance "
    "onnx_edits export_openvino export_onnx encodings proof report output settings scoring evaluate benchmark latency capabilities "
    "mixed steps recipe pipeline summary diagnosis flips probes search quantize tradeoff inspection matching repairs "
    "evidence causes_grids causes diagnose job reexport plan check compare",
    9: "console doctor cli_config cli_again cli_daily cli_tradeoff cli_diagnose cli __init__ __main__",
}
ORDER = {name: (layer, row) for layer, names in LAYERS.items() for row, name in enumerate(names.split())}
LATE = tuple(LAYERS[9].split())  # the shell waits with torch until it is needed
FORBIDDEN = {"utils", "util", "helpers", "misc", "common"}


def modules() -> dict[str, Path]:
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if name == "__init__" or not name.endswith("__init__")}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of the package that one statement imports."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name the package"
        names = [f"{node.module}.{a.name}" for a in node.names]
    for name in names:
        parts = name.split(".")
        if parts[0] != "halfbyte":
            continue
        inside = ".".join(parts[1:])
        known = [m for m in modules() if inside == m or inside.startswith(m + ".")]
        if known:
            yield max(known, key=len)
        elif inside != "__version__":
            yield "__init__"


def violations(name: str, source: str) -> list[str]:
    """What a module of this name may not import."""
    tree = ast.parse(source)
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "halfbyte"}
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        for target in imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if target == "__init__" and used == {"__version__"}:
                continue
            if ORDER[target] >= ORDER[name] and name != "__init__":
                found.append(f"{name} imports {target}, which is not below it")
            if id(node) in late and name not in LATE:
                found.append(f"{name} imports {target} inside a function")
            if name.startswith("transforms.") and target.startswith("transforms."):
                found.append(f"{name} imports its neighbour {target}")
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_has_a_layer_and_imports_downwards(name: str) -> None:
    assert name in ORDER, f"{name} is in no layer: give it one here and in the design"
    assert not violations(name, modules()[name].read_text())


def test_no_module_for_what_belongs_nowhere() -> None:
    assert not {Path(name.replace(".", "/")).name for name in modules()} & FORBIDDEN


def test_layers_name_nothing_that_is_gone() -> None:
    assert set(ORDER) <= set(modules())


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("affine", "from halfbyte.model import QModel", "not below"),
        ("model", "from halfbyte.graph import by_value", "not below"),
        ("lower", "from halfbyte import engines", "not below"),
        ("place", "def f():\n    from halfbyte.ops import Kind", "inside a function"),
        ("transforms.fold_batchnorm", "from halfbyte.transforms.canonicalize import canonicalize", "neighbour"),
        ("place", "import halfbyte", "not below"),
    ],
)
def test_the_rule_sees_what_breaks_it(name: str, source: str, expected: str) -> None:
    assert any(expected in v for v in violations(name, source))


def test_a_module_imports_what_is_below() -> None:
    assert not violations(
        "place", "from halfbyte.ops import Kind\nfrom halfbyte import targets, __version__\nimport torch"
    )
