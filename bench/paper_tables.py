"""What the paper prints of ALMRR in its Tables 1-3 and 5-7 (arXiv 2407.17705), percent; no measurement of ours.

``PAPER[table][variant][category]`` holds one value for each of the table's metrics (tables.py names them); "avg" is the
average that the paper prints.
"""

Values = tuple[float, ...]
CATEGORIES = ("grid", "leather", "tile", "carpet", "wood", "avg")


def _column(*values: float | Values) -> dict[str, Values]:
    """One column of a table, in the order of CATEGORIES."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return dict(zip(CATEGORIES, rows, strict=True))


_OURS = _column((99.5, 61.3), (99.8, 75.6), (99.4, 94.4), (98.6, 76.6), (98.3, 83.8), (99.1, 78.3))

PAPER: dict[str, dict[str, dict[str, Values]]] = {
    "1": {  # image AUROC
        "ALMRR": _column(100.0, 100.0, 100.0, 99.6, 100.0, 99.9),
    },
    "2": {  # pixel AUROC, pixel AP
        "ALMRR": _OURS,
    },
    "3": {  # pixel AUROC, pixel AP
        "CNN(1x1)": _column((99.4, 58.3), (99.7, 73.2), (99.0, 94.0), (98.5, 78.8), (97.6, 80.4), (98.8, 76.9)),
        "CNN(3x3)": _column((99.3, 56.9), (99.7, 74.9), (99.1, 84.5), (97.8, 75.6), (97.8, 80.9), (98.7, 74.6)),
        "Transformer": _column((99.4, 54.4), (99.8, 74.2), (99.6, 93.7), (98.6, 73.3), (97.7, 78.8), (99.0, 74.9)),
        "Mamba": _OURS,
    },
    "5": {  # image AUROC, pixel AUROC, pixel AP
        "without FRM": _column(
            (92.0, 98.6, 55.3), (97.5, 98.8, 68.9), (98.5, 99.0, 90.4), (96.9, 98.0, 73.1), (98.5, 97.8, 76.2),
            (96.7, 98.4, 72.8),
        ),
        "with FRM": _column(
            (100.0, 99.5, 61.3), (100.0, 99.8, 75.6), (100.0, 99.4, 94.4), (99.6, 98.6, 76.6), (100.0, 98.3, 83.8),
            (99.9, 99.1, 78.3),
        ),
    },
    "6": {  # pixel AUROC, pixel AP
        "VGG19": _column((98.1, 59.7), (98.8, 74.2), (97.7, 86.8), (97.6, 66.6), (96.0, 75.2), (97.6, 72.5)),
        "ResNet18": _column((98.5, 60.6), (99.4, 74.4), (98.5, 84.3), (98.0, 66.7), (96.9, 75.7), (98.3, 72.3)),
        "ResNet34": _column((99.0, 59.9), (99.5, 75.0), (98.8, 89.8), (98.5, 72.4), (97.4, 76.5), (98.6, 74.7)),
        "ResNet50": _OURS,
    },
    "7": {  # pixel AUROC, pixel AP
        "blocks 1 2": _column((98.4, 48.8), (99.2, 65.8), (98.5, 89.8), (95.8, 68.4), (97.5, 74.9), (97.9, 69.6)),
        "blocks 2 3": _column((99.2, 56.5), (99.6, 68.5), (98.8, 92.6), (97.7, 77.2), (98.3, 80.4), (98.7, 75.0)),
        "blocks 1 2 3": _OURS,
        "blocks 1 2 3 4": _column((98.9, 56.8), (99.6, 73.8), (99.0, 94.9), (97.8, 72.5), (99.2, 84.5), (98.9, 76.5)),
    },
}  # fmt: skip
