"""The demo and the notebooks run in a short setting."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FAST = {**os.environ, "FLOWME_FAST": "1", "MPLBACKEND": "Agg"}


def test_demo(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", tmp_path / "out"],
        env=FAST, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"senescence_law.png", "senescence_compare.csv", "theophylline_fits.png"} <= made
    assert str(tmp_path / "out") in run.stdout
    assert "-2LL" in run.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("FLOWME_FAST", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
