"""Tests of studies/threshold.py: students by their bases, and who wins."""
import re

from studies import threshold


def test_threshold_page_counts_who_wins(tmp_path, monkeypatch):
    """By hand: the page sorts students by their bases, and counts where distillation beats RL,
    where RL stays below one half, and where RL is cheaper."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threshold, "POINTS", ((48, 250), (64, 800)))
    values = {"48-250": (0.02, 0.05, 0.6), "default": (0.04, 0.06, 0.9), "64-800": (0.15, 0.9, 0.8)}
    rows = {f"{name}.{fate}{cost}": {"per_seed": {"0": x}} for name, found in values.items()
            for fate, x in zip(threshold.FATES, found) for cost in ("", ".tflop")}
    rows |= {f"{name}.base, on dev": {"per_seed": {"0": 0.01}} for name in values}
    lines = threshold.page(rows, {})
    assert [re.findall(r"0\.\d+", line)[:3] for line in lines if ", seed 0" in line] == [
        ["0.020", "0.050", "0.600"], ["0.040", "0.060", "0.900"], ["0.150", "0.900", "0.800"]]
    text = "\n".join(lines)
    assert "Distillation beats RL on 2 of 3 students, the best of them with a base at 0.040" in text
    assert "RL stays below one half on 2, with bases up to 0.040" in text
    assert "fewer FLOPs than distillation on 2." in text
    assert "48, 250 steps: that distillation beats RL holds; the difference is +55.0 points, one" \
        in text
    assert "800 steps: that distillation beats RL is reversed; the difference is -10.0" in text
