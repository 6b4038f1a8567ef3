"""The README's code runs as written, in a short setting."""

import functools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import flowme as fm

README = Path(__file__).resolve().parents[1] / "README.md"


# The README compares on 12 subjects, where PSIS and ArviZ have things to say.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
@pytest.mark.filterwarnings("ignore:importance sampling:UserWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword:Warning")  # arviz 0.23, on pandas 3
@pytest.mark.filterwarnings("ignore:Covariate 'WT' is empty:flowme.study.StudyWarning")
@pytest.mark.filterwarnings("ignore:(R-hat|effective sample size|[0-9]+ divergent):UserWarning")
def test_code_of_the_readme(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    short = functools.partial(fm.VariationalEM, flow_updates=5, folds=2)
    monkeypatch.setattr(fm, "VariationalEM", short)
    nuts = functools.partial(fm.nuts, num_warmup=60, num_samples=40, num_chains=2, progress=False)
    monkeypatch.setattr(fm, "nuts", nuts)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert scope["fit"].converged
    assert {str(r) for r in scope["result"].best.reactions} == {"H -> 2H", "H + L -> 2L", "L -> 0"}
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "fits.png",
        "vpc.png",
        "law.png",
        "hare_lynx.png",
    }
    assert "elpd" in capsys.readouterr().out
    plt.close("all")
