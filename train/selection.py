"""What the indexers select, measured beside the dense forward: attention mass caught, distances, coverage, maps.

Shapes: T tokens of a window, R measured query rows, Hi indexer heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_export.model import AttentionTrace
from plugins.index_topk import index_scores
from train.losses import mean_attention

ROWS = 128
"""Measured query rows handled at a time."""
DISTANCES = (1, 16, 64, 256, 1024, 4096)
"""Bounds of the distance buckets: [0, 1), [1, 16), … , [4096, ∞)."""
MAP_SIZE = 256
"""Largest side of a selection map; longer windows are averaged down to it."""


class SelectionMeter:
    """An observer of one dense forward per window, or of its last tokens after a cache, of a batch of one row.

    Every `every`-th query is measured. The attention mass of a query is its mean over the heads. At each k of `ks`
    only queries count that see more than k keys, except in `curve`, which counts all: there a query with k keys or
    fewer has caught everything.

    What is selected are the k tokens of the best scores: the operator's always selected ones (sinks, window, the last
    group of pooled keys) are not put first. The indexer is judged on the dense model's own hidden states, as in the
    warm-up; a layer that follows another's selection, by its own attention.
    """

    def __init__(self, layers: int, heads: int, ks: Sequence[int], every: int, map_layers: Sequence[int] = ()):
        self.ks, self.every = list(ks), every
        # caught by indexer, window, best; and what is selected: mean distance, share within the window
        self.sums = torch.zeros(layers, len(ks), 5, dtype=torch.float64)
        self.rows = torch.zeros(len(ks), dtype=torch.int64)
        self.coverage = torch.zeros(layers, len(ks), dtype=torch.float64)
        self.windows = torch.zeros(len(ks), dtype=torch.int64)
        self.head_shares = torch.zeros(layers, heads, len(DISTANCES) + 1, dtype=torch.float64)
        self.head_rows = 0
        self.curves: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * layers
        self.curve_rows = 0
        self.map_layers = set(map_layers)
        self.maps: dict[int, Tensor] = {}
        self.mass_maps: dict[int, Tensor] = {}  # the attention itself, beside what is selected of it

    @torch.no_grad()
    def __call__(self, trace: AttentionTrace) -> dict[str, Tensor]:
        with torch.autocast(trace.q.device.type, enabled=False):
            self._measure(trace)
        return {}

    def _measure(self, t: AttentionTrace) -> None:
        T = int(t.kv_lengths[0])
        past = T - t.q.shape[2]
        device = t.q.device
        queries = torch.arange(self.every - 1, T - past, self.every, device=device)
        if t.layer == 0:
            counted = torch.tensor([int((past + queries >= k).sum()) for k in self.ks])
            self.rows += counted
            self.windows += counted > 0
            self.curve_rows += len(queries)
        slots = torch.arange(T, device=device)
        used = torch.zeros(len(self.ks), T, dtype=torch.bool, device=device)
        curve = torch.zeros(T, dtype=torch.float64, device=device)
        selected_rows = []
        mass_rows = []
        for rows in queries.split(ROWS):
            positions = past + rows[:, None]
            visible = slots <= positions
            mass = mean_attention(t.q[0][:, rows] * t.scale, t.k[0, :, :T], visible)
            scores = index_scores(t.index_q[:, rows], t.index_weights[:, rows], t.scored_k[:, :T])[0]
            # A stable sort keeps the lower of two equal indices first, as the operator does.
            order = scores.masked_fill_(~visible, -torch.inf).argsort(stable=True, dim=-1, descending=True)
            caught = mass.gather(-1, order).cumsum(-1)
            best = mass.topk(min(max(self.ks), T), dim=-1).values.cumsum(-1)
            behind = mass.cumsum(-1)
            curve += caught.sum(0)
            for number, k in enumerate(self.ks):
                crowded = positions[:, 0] >= k
                if not crowded.any():
                    continue
                chosen, ends = order[crowded, :k], positions[crowded]
                window = 1 - behind[crowded].gather(-1, ends - k)
                distance = ends - chosen
                used[number, chosen.flatten()] = True
                self.sums[t.layer, number] += torch.stack(
                    [
                        caught[crowded, k - 1].sum(),
                        window.sum(),
                        best[crowded, k - 1].sum(),
                        distance.float().mean(-1).sum(),
                        (distance < k).float().mean(-1).sum(),
                    ]
                ).double().cpu()  # fmt: skip
            if t.layer in self.map_layers and t.layer not in self.maps:
                k = self.ks[0]
                chosen = torch.zeros(len(rows), T, dtype=torch.bool, device=device)
                selected_rows.append((chosen.scatter_(-1, order[:, :k], True) & visible).cpu())
                mass_rows.append(mass.float().cpu())
        self.coverage[t.layer] += used.double().mean(-1).cpu()  # 0 where no query counts
        self._add_curve(t.layer, curve.cpu())
        self._measure_heads(t, queries, past)
        if selected_rows:
            self.maps[t.layer] = _shrink(torch.cat(selected_rows).float())
            self.mass_maps[t.layer] = _shrink(torch.cat(mass_rows))

    def _measure_heads(self, t: AttentionTrace, queries: Tensor, past: int) -> None:
        """Where each head's own best keys lie: the shares of its top k (the first of `ks`) by distance."""
        k = self.ks[0]
        rows = queries[past + queries >= k]
        rows = rows[:: max(1, len(rows) // ROWS)]
        if t.layer == 0:
            self.head_rows += len(rows)
        if not len(rows):
            return
        slots = torch.arange(t.scored_k.shape[1], device=rows.device)
        bounds = torch.tensor(DISTANCES, device=rows.device)
        for head in range(t.index_q.shape[2]):
            one = slice(head, head + 1)
            scores = index_scores(t.index_q[:, rows, one], t.index_weights[:, rows, one], t.scored_k)[0]
            ends = past + rows[:, None]
            chosen = scores.masked_fill_(slots > ends, -torch.inf).topk(k, dim=-1).indices
            buckets = torch.bucketize(ends - chosen, bounds, right=True)
            counts = torch.bincount(buckets.flatten(), minlength=len(DISTANCES) + 1)
            self.head_shares[t.layer, head] += counts.double().cpu() / k

    def _add_curve(self, layer: int, curve: Tensor) -> None:
        longer, shorter = sorted((self.curves[layer], curve), key=len, reverse=True)
        longer = longer.clone()
        longer[: len(shorter)] += shorter
        if len(shorter):  # rows of a shorter window have caught everything beyond it
            longer[len(shorter) :] += shorter[-1]
        self.curves[layer] = longer

    def caught(self) -> Tensor:
        """[layers, T]: mean share of attention mass in the indexer's k best keys, at k = 1 … T."""
        return torch.stack(self.curves) / self.curve_rows

    def results(self) -> list[dict[str, Any]]:
        """One record per k that some query exceeds: shares by layer and their means, and what was selected."""
        records = []
        for number, k in enumerate(self.ks):
            rows = int(self.rows[number])
            if not rows:
                continue
            recall, window, best, distance, local = (self.sums[:, number] / rows).unbind(-1)
            normalised = (recall - window) / (best - window).clamp(min=1e-9)
            records.append(
                {
                    "k": k,
                    "queries": rows,
                    "recall": float(recall.mean()),
                    "window": float(window.mean()),
                    "best": float(best.mean()),
                    "normalised": float((recall - window).mean() / (best - window).mean().clamp(min=1e-9)),
                    "by_layer": {
                        "recall": recall.tolist(),
                        "window": window.tolist(),
                        "best": best.tolist(),
                        "normalised": normalised.tolist(),
                        "mean_distance": distance.tolist(),
                        "share_within_window": local.tolist(),
                        "coverage": (self.coverage[:, number] / int(self.windows[number])).tolist(),
                    },
                }
            )
        return records

    def heads(self) -> dict[str, Any]:
        """Shares of each indexer head's own top k by distance: [layers][heads][buckets]."""
        shares = self.head_shares / max(1, self.head_rows)
        return {"k": self.ks[0], "bounds": list(DISTANCES), "shares": shares.tolist()}


def _shrink(image: Tensor) -> Tensor:
    """[R, T] → at most MAP_SIZE on each side, by means."""
    size = (min(image.shape[0], MAP_SIZE), min(image.shape[1], MAP_SIZE))
    return torch.nn.functional.adaptive_avg_pool2d(image[None], size)[0]
