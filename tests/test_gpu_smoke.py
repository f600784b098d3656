"""The script that sanitizers watch on a GPU runs: the first GPU must not find its errors."""

from __future__ import annotations

import gpu_smoke
import pytest


@pytest.mark.parametrize("family", gpu_smoke.FAMILIES)
def test_every_family_runs(family):
    assert gpu_smoke.FAMILIES[family]("cpu") > 0


def test_unknown_families_are_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_smoke.py", "--device", "cpu", "transprot"])
    with pytest.raises(SystemExit):
        gpu_smoke.main()
    assert "expected one of divergence, relation" in capsys.readouterr().err
