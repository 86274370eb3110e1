"""The floors of the package: an import points down this table or stays on its floor, and there is no circle.

An entry that ends in a dot stands for all modules of a folder.
"""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# fmt: off
FLOORS = [
    ["almrr_ref.__init__"],
    ["almrr_ref.train", "almrr_ref.evaluate", "almrr_ref.predict", "almrr_ref.export",
     "almrr_ref.calibrate", "almrr_ref.doctor", "almrr_ref.serve."],  # the commands
    ["almrr_ref.watch."],
    ["almrr_ref.fit", "almrr_ref.timing"],
    ["almrr_ref.calibration.", "almrr_ref.training"],
    ["almrr_ref.demo."],
    ["almrr_ref.metrics"],
    ["almrr_ref.detector"],
    ["almrr_ref.report."],
    ["almrr_ref.model"],
    ["almrr_ref.deploy."],
    ["almrr_ref.plus."],
    ["almrr_ref.mfrm", "almrr_ref.frm", "almrr_ref.encoders", "almrr_ref.mamba", "almrr_ref.features",
     "almrr_ref.anomalies", "almrr_ref.losses", "almrr_ref.optimiser"],  # the paper
    ["almrr_ref.backbones.", "almrr_ref.data.", "kernels."],
    ["almrr_ref.perlin"],
    ["almrr_ref.run."],
    ["almrr_ref.config"],
]
# fmt: on
FILES = [*ROOT.glob("almrr_ref/**/*.py"), *ROOT.glob("kernels/*.py")]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}


def floor(name: str) -> int:
    """Number of a module's floor, from the top."""
    fits = [any(name == e or (e[-1] == "." and name.startswith(e)) for e in entries) for entries in FLOORS]
    assert any(fits), f"{name} stands on no floor"
    return fits.index(True)


def imported(name: str, text: str) -> set[str]:
    """Names of our modules that a module imports, anywhere in its text, also inside functions."""
    targets: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            targets += [f"{base}.{alias.name}" for alias in node.names]
    found = set()
    for target in targets:
        target = target.replace("almrr_ref.kernels", "kernels")
        candidates = [target, f"{target}.__init__", target.rpartition(".")[0], target.rpartition(".")[0] + ".__init__"]
        found |= set([c for c in candidates if c in MODULES][:1])
    return found - {name}


def test_every_import_points_down_and_there_is_no_circle() -> None:
    graph = {name: imported(name, file.read_text()) for name, file in MODULES.items()}
    upward = [(name, target) for name, targets in graph.items() for target in targets if floor(target) < floor(name)]
    assert not upward
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_reading_of_imports_sees_every_form() -> None:
    text = "import almrr_ref.frm\nfrom almrr_ref import data\nfrom almrr_ref.run import text as t\ndef f():\n"
    text += (
        "    from .mfrm import MFRM\n    from almrr_ref.kernels.chunked import y\n    from almrr_ref.kernels import z\n"
    )
    expected = {"almrr_ref.frm", "almrr_ref.data.__init__", "almrr_ref.run.text", "almrr_ref.mfrm"}
    assert imported("almrr_ref.model", text) == expected | {"kernels.chunked", "kernels.__init__"}
