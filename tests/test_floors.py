"""The floors of the package: an import points down this table or stays on its floor, and there is no circle.

An entry that ends in a dot stands for all modules of a folder.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# fmt: off
FLOORS = [
    ["almrr_ref.__init__"],
    ["almrr_ref.train", "almrr_ref.evaluate", "almrr_ref.predict", "almrr_ref.export"],  # the commands
    ["almrr_ref.calibrate", "almrr_ref.training"],
    ["almrr_ref.demo."],
    ["almrr_ref.metrics"],
    ["almrr_ref.report."],
    ["almrr_ref.model"],
    ["almrr_ref.deploy."],
    ["almrr_ref.plus."],
    ["almrr_ref.mfrm", "almrr_ref.frm", "almrr_ref.encoders", "almrr_ref.mamba", "almrr_ref.features",
     "almrr_ref.anomalies", "almrr_ref.losses"],  # the paper
    ["almrr_ref.backbones.", "almrr_ref.data.", "kernels."],
    ["almrr_ref.perlin"],
    ["almrr_ref.run."],
    ["almrr_ref.config"],
]
# fmt: on


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package and of kernels."""
    files = [*ROOT.glob("almrr_ref/**/*.py"), *ROOT.glob("kernels/*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def place(name: str) -> int:
    """Number of a module's floor, from the top."""
    fits = [any(name == e or (e[-1] == "." and name.startswith(e)) for e in floor) for floor in FLOORS]
    assert any(fits), f"{name} stands on no floor"
    return fits.index(True)


def imported(name: str, tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Names of our modules that a module imports, anywhere in its text, also inside functions."""
    found = set()
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            targets = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.replace("almrr_ref.kernels", "kernels").split(".")
            for length in range(len(parts), 0, -1):
                prefix = ".".join(parts[:length])
                if match := {prefix, prefix + ".__init__"} & known.keys():
                    found |= match
                    break
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, ast.parse(file.read_text()), known) - {name} for name, file in known.items()}


def test_every_import_points_down():
    upward = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if place(target) < place(name)
    ]
    assert not upward


def test_there_is_no_circle():
    edges, done, path = graph(), set(), []

    def visit(name: str) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for target in edges[name]:
                visit(target)
            done.add(path.pop())

    for name in edges:
        visit(name)


def test_the_reading_of_imports_sees_every_form():
    known = {"a.b": ROOT, "a.c.d": ROOT, "a.c.__init__": ROOT, "kernels.x": ROOT}
    text = (
        "import a.b\nfrom a.c import d\ndef f():\n    from ..a.c import other\n    from almrr_ref.kernels.x import y\n"
    )
    assert imported("z.q", ast.parse(text), known) == {"a.b", "a.c.d", "a.c.__init__", "kernels.x"}
