"""What the records say: pairs, crossover lengths, time to first token, sentences. No measuring, no drawing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dsa_export.selection import describe_selection

Record = dict[str, Any]
Series = tuple[str, str, str, int]
"""backend, precision, k as text, batch: what one line of a plot or one crossover belongs to."""
CONTENDED = 0.1
"""Share of their time that threads wait for a processor (bench.measure.Contention) from which on a reader is told."""


@dataclass(frozen=True)
class Pair:
    """One case: the strongest dense side and the sparse one.

    dense_ttft_s: of the dense side that had its first token first, which need not be the strongest one.
    """

    dense: Record
    sparse: Record
    dense_ttft_s: float | None

    @property
    def series(self) -> Series:
        return (self.sparse["backend"], self.sparse["precision"], describe_k(self.sparse), self.sparse["batch"])

    @property
    def phase(self) -> str:
        return self.sparse["phase"]

    @property
    def context(self) -> int:
        return self.sparse["context"]


def describe_k(record: Record) -> str:
    """k and the options of the selection."""
    return describe_selection(record["k"], record.get("selection", {}))


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def pairs(records: Iterable[Record]) -> list[Pair]:
    """The pairs in the order of measurement."""
    by_case: dict[tuple[Any, ...], list[Record]] = {}
    for record in of_kind(records, "timing"):
        names = ("backend", "precision", "phase", "batch", "context")
        by_case.setdefault((*(record[name] for name in names), describe_k(record)), []).append(record)
    found = []
    for sides in by_case.values():
        (sparse,) = (side for side in sides if side["variant"] == "sparse")
        dense = [side for side in sides if side["variant"] == "dense"]
        (strongest,) = (side for side in dense if side["strongest"])
        seconds = [side["ttft_s"] for side in dense if side["ttft_s"] is not None]
        found.append(Pair(strongest, sparse, min(seconds, default=None)))
    return found


def by_series(measured: Sequence[Pair], phase: str) -> dict[Series, list[Pair]]:
    """The pairs of one phase, every series in the order of growing context."""
    found: dict[Series, list[Pair]] = {}
    for pair in sorted(measured, key=lambda pair: pair.context):
        if pair.phase == phase:
            found.setdefault(pair.series, []).append(pair)
    return found


def series_text(series: Series, among: Iterable[Series]) -> str:
    """The parts of a series' name in which it differs from the others; nothing where it stands alone."""
    every = list(among)
    words = (series[0], series[1], f"k = {series[2]}", f"batch {series[3]}")
    return ", ".join(word for i, word in enumerate(words) if len({other[i] for other in every}) > 1)


@dataclass(frozen=True)
class Crossover:
    """Context from which on sparse is the faster one. tokens: interpolated; None where the lines do not cross."""

    tokens: float | None
    text: str


def crossover(points: Sequence[tuple[int, float]]) -> Crossover:
    """points: (context, speed-up) in growing order. The last upward crossing of 1 counts: behind it sparse stays ahead.

    Between two measured contexts the logarithm of the speed-up is taken as linear in the logarithm of the context.
    """
    (first, _), (last, at_last) = points[0], points[-1]
    if at_last < 1:
        return Crossover(None, f"none up to {last:,} tokens")
    for (low, before), (high, after) in reversed(list(itertools.pairwise(points))):
        if before < 1 <= after:
            share = -math.log(before) / (math.log(after) - math.log(before))
            tokens = low * (high / low) ** share
            return Crossover(tokens, f"{tokens:,.0f} tokens (between {low:,} and {high:,})")
    return Crossover(None, f"below {first:,} tokens, the shortest measured" if first < last else f"at most {first:,}")


def first_tokens(measured: Sequence[Pair]) -> list[Record]:
    """Time to first token of every prompt length: measured where the text was prefilled, else summed from the chunks.

    The sum integrates the time of a prefill call over the contexts at which it was timed, linearly in between; it is
    marked as estimated, and made only from two contexts on.
    """
    found: list[Record] = []
    for series, line in by_series(measured, "prefill").items():
        dense, sparse = (_prefill_seconds([getattr(pair, side) for pair in line]) for side in ("dense", "sparse"))
        for number, pair in enumerate(line):
            known = (pair.dense_ttft_s, pair.sparse["ttft_s"])
            seconds = (dense[number], sparse[number]) if None in known else known
            if None not in seconds:
                found.append(
                    {
                        "kind": "first_token",
                        "series": list(series),
                        "context": pair.context,
                        "batch": pair.sparse["batch"],
                        "dense_s": seconds[0],
                        "sparse_s": seconds[1],
                        "estimated": None in known,
                    }
                )
    return found


def _prefill_seconds(line: Sequence[Record]) -> list[float | None]:
    """Seconds from an empty cache to each record's context, by trapezoids over the seconds per token of its calls."""
    if len(line) < 2:
        return [None] * len(line)
    rates = [(record["context"], record["ms_median"] / record["queries"] / 1e3) for record in line]
    seconds, total, (at, rate) = [], 0.0, (0, rates[0][1])
    for context, here in rates:
        total += (context - at) * (rate + here) / 2
        at, rate = context, here
        seconds.append(total)
    return list(seconds)


def sentence(measured: Sequence[Pair]) -> str:
    """The headline: the longest context at batch 1 (or the smallest batch), decoding if it was measured."""
    phase = "decode" if any(pair.phase == "decode" for pair in measured) else "prefill"
    batch = min(pair.sparse["batch"] for pair in measured)
    chosen = [pair for pair in measured if pair.phase == phase and pair.sparse["batch"] == batch]
    longest = max(pair.context for pair in chosen)
    there = [pair for pair in chosen if pair.context == longest]
    best = max(there, key=lambda pair: pair.sparse["speedup"])
    among = f", the best of {len(there)} pairs" if len(there) > 1 else ""
    dense, sparse = best.dense, best.sparse
    call = "one decoding step" if phase == "decode" else f"a prefill call of {sparse['queries']} tokens"
    ratio = sparse["speedup"]
    verdict = f"{ratio:.2f}× as fast" if ratio >= 1 else f"slower, at {ratio:.2f}× the speed"
    agreement = ""
    if sparse["agreement"] is not None:
        share, tokens = sparse["agreement"]["top1"], sparse["agreement"]["tokens"]
        agreement = f"; both prefer the same next token in {share:.0%} of {tokens} cases"
    warning = "; the indexer is random, so only the timing means anything" if sparse["random_indexer"] else ""
    if (share := max(pair.sparse.get("contention") or 0 for pair in measured)) > CONTENDED:
        warning += f"; but other programs kept our threads from running for up to {share:.0%} of their time, which "
        warning += "lengthens long calls most: measure again on an idle machine"
    return (
        f"At {longest:,} tokens of context (batch {batch}, {sparse['backend']}, {sparse['precision']}) {call} takes "
        f"{ms(dense)} ms dense ({dense['core']}) and {ms(sparse)} ms sparse (k = {describe_k(sparse)}{among}): "
        f"{verdict} where bytes and operations predict {sparse['speedup_predicted']:.2f}×{agreement}{warning}."
    )


def against_peers(records: Iterable[Record]) -> list[tuple[Record, Record | None]]:
    """Every peer, which decodes on a CPU, and our fastest sparse engine there in its precision, context and batch."""
    records = list(records)
    ours = [r for r in of_kind(records, "timing") if r["variant"] == "sparse" and r["phase"] == "decode"]
    alike = ("context", "batch", "precision")
    found = []
    for peer in of_kind(records, "peer"):
        here = [r for r in ours if not r["on_gpu"] and all(r[name] == peer[name] for name in alike)]
        found.append((peer, max(here, key=lambda r: r["tokens_per_s"], default=None)))
    return found


def rounded(value: float) -> str:
    """To three figures, and to a whole number from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ms(record: Record) -> str:
    return rounded(record["ms_median"])


def ms_with_spread(record: Record) -> str:
    low, high = (f"{record[key]:,.0f}" if record[key] >= 10 else f"{record[key]:.2g}" for key in ("ms_p10", "ms_p90"))
    return f"{ms(record)} ({low}–{high})"
