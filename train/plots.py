"""Loss curves as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_metrics(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws every loss of the steps, and the shares of attention mass, over the step: one panel each."""
    from matplotlib.figure import Figure

    steps = [m for m in metrics if "evaluation" not in m]
    names = [name for name in ("cross_entropy", "kl") if any(name in m for m in steps)]
    recalls = [name for name in ("recall", "recall_best", "recall_window") if any(name in m for m in steps)]
    panels = [[name] for name in names] + ([recalls] if recalls else [])
    figure = Figure(figsize=(5 * max(1, len(panels)), 4), layout="constrained")
    figure.suptitle(title)
    for column, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), column, xlabel="step", title=panel[0])
        for name in panel:
            axes.plot([m["step"] for m in steps], [m[name] for m in steps], label=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format="png")
