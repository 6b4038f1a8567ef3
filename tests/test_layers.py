"""Imports go down the layers, never up; public names fit on one screen."""

import ast
from pathlib import Path

import flowme

LAYERS = {
    1: {
        "study",
        "labels",
        "columns",
        "table",
        "rows",
        "arrange",
        "levels",
        "writing",
        "other_times",
        "selection",
        "description",
        "covariate_table",
        "regimen",
        "events",
        "occasions",
        "datasets",
        "simulated",
    },
    2: {
        "accelerator",
        "garbage",
        "plain",
        "quick",
        "recorded",
        "where",
        "covariate",
        "quantile",
        "flows",
        "effects",
        "flow_effect",
        "mixture_effect",
        "per_occasion",
        "kernel_mixture",
        "semi_nonparametric",
        "residual",
        "autocorrelation",
        "censoring",
        "outcomes",
        "normal_tail",
        "structural",
        "written_out",
        "closed_forms",
        "disposition",
        "exponential",
        "integrate",
        "linear",
        "lockstep",
        "schedule",
        "steady",
    },
    3: {"primitives", "hierarchy", "roles"},
    4: {"infer"},
    5: {"predict", "convert", "npde"},
    6: {"diagnostics", "plots", "report"},
    7: {"discovery"},
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
PACKAGE = Path(flowme.__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flowme":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("flowme."))


def test_no_module_reaches_up():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        assert module in LAYER, f"{module} has no layer: add it to LAYERS"
        for other in imported(path):
            seen += 1
            assert LAYER[other] <= LAYER[module], f"{path.name} imports flowme.{other}, a layer up"
    assert seen > 30


def test_public_names_fit_on_a_screen():
    assert len(flowme.__all__) <= 45  # and brackets: 50 lines
    assert all(hasattr(flowme, name) for name in flowme.__all__)
