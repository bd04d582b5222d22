"""The tables of a comparison, as rows of text: printed by rich in a terminal, set as HTML in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable

from bench import summary
from bench.summary import Pair, Record, ms_with_spread
from dsa_export.cli import print_wide

TABLE_WIDTH = 128
"""Width of what is printed into a pipe or file."""


@dataclass(frozen=True)
class Table:
    """notes: what the columns mean, one line. The first `left` columns are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str = ""
    left: int = 1


def print_tables(tables: Sequence[Table]) -> None:
    print_wide(map(_for_rich, tables), TABLE_WIDTH)


def _for_rich(table: Table) -> RichTable:
    shown = RichTable(
        title=table.title,
        caption=table.notes or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number < table.left else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def all_tables(records: Sequence[Record]) -> list[Table]:
    measured = summary.pairs(records)
    tables = [*timing_tables(measured), *crossovers(measured), *throughput(measured), *first_token(measured)]
    tables += [*scores(measured), *operators(records), *peers(records), *skipped(records)]
    return [table for table in tables if table.rows]


SHORT = {"GroupQueryAttention": "GQA", "DenseAttention": "ours"}
TIMING_NOTES = (
    "ms of one call: median (p10–p90) of alternating runs. Dense is the strongest dense operator of the runtime. "
    "Predicted: ratio of the floors, the larger of bytes to read and operations to do at the rates measured in this "
    "run. Of floor: the share of that speed reached. Pairs are dense, sparse."
)


def timing_tables(measured: Sequence[Pair]) -> list[Table]:
    """One table of times per backend, precision and k."""
    by_group: dict[str, list[Pair]] = {}
    for pair in measured:
        backend, precision, k, _ = pair.series
        by_group.setdefault(f"{backend}, {precision}, k = {k}", []).append(pair)
    columns = ("phase", "batch", "context", "dense ms", "sparse ms", "speed-up", "predicted", "of floor")
    found = []
    for title, line in by_group.items():
        cores = list(dict.fromkeys(pair.dense["core"] for pair in line))
        caches = "" if line[0].sparse["caches"] == "prefill" else "; random caches"
        if len(cores) == 1:
            found.append(
                Table(f"{title}; dense: {cores[0]}{caches}", columns, [_timing_row(p) for p in line], TIMING_NOTES)
            )
        else:
            rows = [[*_timing_row(pair), str(SHORT.get(pair.dense["core"], pair.dense["core"]))] for pair in line]
            named = " or ".join(f"{core} ({SHORT[core]})" if core in SHORT else core for core in cores)
            found.append(Table(f"{title}; dense: {named}{caches}", (*columns, "dense is"), rows, TIMING_NOTES))
    return found


def _timing_row(pair: Pair) -> list[str]:
    dense, sparse = pair.dense, pair.sparse
    return [
        *_case(pair),
        ms_with_spread(dense),
        ms_with_spread(sparse),
        f"{sparse['speedup']:.2f}×",
        f"{sparse['speedup_predicted']:.2f}×",
        f"{dense['floor_fraction']:.0%}, {sparse['floor_fraction']:.0%}",
    ]


def _case(pair: Pair) -> list[str]:
    phase = "decode" if pair.phase == "decode" else f"prefill {pair.sparse['queries']}"
    return [phase, str(pair.sparse["batch"]), f"{pair.context:,}"]


def throughput(measured: Sequence[Pair]) -> list[Table]:
    rows = [
        [
            *pair.series[:3],
            *_case(pair),
            *(summary.rounded(side["tokens_per_s"]) for side in (pair.dense, pair.sparse)),
            *(
                "–" if side.get("peak_mib") is None else f"{side['peak_mib']:,.0f}"
                for side in (pair.dense, pair.sparse)
            ),
        ]
        for pair in measured
    ]
    columns = ("backend", "precision", "k", "phase", "batch", "context", "tok/s dense", "sparse", "MiB dense", "sparse")
    notes = (
        "Tokens per second of all rows together. MiB: most memory that the engine added to its process while running."
    )
    return [Table("Throughput and peak memory", columns, rows, notes, left=4)]


def crossovers(measured: Sequence[Pair]) -> list[Table]:
    rows = []
    for phase in ("decode", "prefill"):
        lines = summary.by_series(measured, phase)
        for series, line in lines.items():
            points = [(pair.context, pair.sparse["speedup"]) for pair in line]
            backend, precision, k, batch = series
            rows.append([phase, backend, precision, k, str(batch), summary.crossover(points).text])
    columns = ("phase", "backend", "precision", "k", "batch", "sparse is faster from")
    notes = "Interpolated between measured contexts, linear in the logarithms; the last crossing counts."
    return [Table("Crossover", columns, rows, notes, left=3)]


def first_token(measured: Sequence[Pair]) -> list[Table]:
    rows = [
        [
            *found["series"][:3],
            str(found["batch"]),
            f"{found['context']:,}",
            *(f"{'≈ ' if found['estimated'] else ''}{found[side]:.3g}" for side in ("dense_s", "sparse_s")),
            f"{found['dense_s'] / found['sparse_s']:.2f}×",
        ]
        for found in summary.first_tokens(measured)
    ]
    columns = ("backend", "precision", "k", "batch", "prompt", "dense s", "sparse s", "ratio")
    notes = (
        "Seconds to prefill a prompt from an empty cache, once, dense by the operator that takes least: the pieces "
        "between the contexts of the run, summed, each at the capacity of its own context. ≈: estimated from the calls."
    )
    return [Table("Time to first token", columns, rows, notes, left=2)]


def scores(measured: Sequence[Pair]) -> list[Table]:
    """One row per context: both phases of a case have the same caches and the same scores."""
    rows: dict[tuple[object, ...], list[str]] = {}
    for pair in measured:
        agreement = pair.sparse["agreement"]
        if agreement is None:
            continue
        backend, precision, k, batch = pair.series
        error = agreement["loss_error"]
        row = [
            backend,
            precision,
            k,
            str(batch),
            f"{pair.context:,}",
            f"{pair.dense['loss']:.4f}",
            f"{pair.sparse['loss']:.4f}",
            f"{pair.sparse['loss'] - pair.dense['loss']:+.4f}" + (f" ± {error:.4f}" if error is not None else ""),
            f"{agreement['top1']:.1%}",
            f"{agreement['kl']:.1e}",
            str(agreement["tokens"]),
        ]
        rows.setdefault((*pair.series, pair.context), row)  # decoding comes first
    columns = (
        "backend",
        "precision",
        "k",
        "batch",
        "context",
        "loss dense",
        "loss sparse",
        "difference",
        "same top-1",
        "KL",
        "tokens",
    )
    notes = (
        "Teacher-forced on the last tokens of the same text, sparse against the strongest dense side: mean negative "
        "log-likelihood in nats, the difference with its standard error (between blocks of 64 tokens or more), "
        "agreement, KL."
    )
    return [Table("Agreement and loss", columns, list(rows.values()), notes, left=2)]


def operators(records: Sequence[Record]) -> list[Table]:
    profiles = summary.of_kind(records, "profile")
    parts = list(dict.fromkeys(part for record in profiles for part in record["ms"]))
    rows = [
        [
            f"{record['precision']}, k = {summary.describe_k(record)}",
            record["core"],
            f"{record['context']:,}",
            *(f"{record['ms'].get(part, 0):.3g}" for part in parts),
            f"{sum(record['ms'].values()):.4g}",
        ]
        for record in profiles
    ]
    columns = ("engine", "attention", "context", *parts, "sum")
    notes = (
        "ms of one decoding step by ONNX Runtime's profiler, median of the steps; the profiler itself costs a little."
    )
    return [Table("Where the time goes", columns, rows, notes, left=2)]


def peers(records: Sequence[Record]) -> list[Table]:
    rows = [
        [
            peer["peer"],
            peer["precision"],
            f"{peer['context']:,}",
            ms_with_spread(peer),
            summary.rounded(peer["tokens_per_s"]),
            "–" if peer["ttft_s"] is None else summary.rounded(peer["ttft_s"]),
            *(
                ("–", "none in this precision", "–")
                if ours is None
                else (
                    summary.rounded(ours["tokens_per_s"]),
                    f"k = {summary.describe_k(ours)}",
                    f"{ours['tokens_per_s'] / peer['tokens_per_s']:.2f}×",
                )
            ),
        ]
        for peer, ours in summary.against_peers(records)
    ]
    columns = (
        "peer",
        "precision",
        "context",
        "ms a token",
        "tokens/s",
        "first token s",
        "ours",
        "which",
        "ratio",
    )
    notes = (
        "Decoding on the CPU, batch 1, the same weights, precision and threads. Ours: tokens/s of the fastest sparse "
        "engine, which is named beside it."
    )
    return [Table("Peers", columns, rows, notes, left=2)]


def skipped(records: Sequence[Record]) -> list[Table]:
    rows: dict[tuple[str, str], list[str]] = {}
    for record in summary.of_kind(records, "skipped"):
        words: list[str | None] = [record.get(name) for name in ("backend", "precision", "variant", "peer", "engine")]
        words.append(f"k = {summary.describe_k(record)}" if "k" in record else None)
        words.append(f"batch {record['batch']}" if "batch" in record else None)
        what = ", ".join(str(word) for word in words if word)
        context = f"{record['context']:,}" if "context" in record else ""
        row = rows.setdefault((what, record["reason"]), [what, "", record["reason"]])
        row[1] = ", ".join(dict.fromkeys([part for part in (*row[1].split(", "), context) if part]))
    return [Table("Not measured", ("what", "contexts", "why"), list(rows.values()), left=3)]
