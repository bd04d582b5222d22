"""The tables that train.evaluate prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from dsa_export.cli import print_wide
from dsa_export.topk import describe_topk
from train.ladder import BLOCK, RUNGS, WINDOWS
from train.study import Record

TABLE_WIDTH = 132


def show(table: Table) -> None:
    print_wide([table], TABLE_WIDTH)


def text_table(record: Record) -> Table:
    """The ladder at one length, with the shares of attention mass beside the trained indexer."""
    check, dense = record["full_selection"], record["dense"]
    few = f"blocks of {BLOCK} tokens (of fewer than {WINDOWS} windows: rather too small)"
    scored = f", the last {record['score_tokens']} tokens of each" if record["score_tokens"] else ""
    spread = few if record["windows"] < WINDOWS else "the windows"
    table = Table(
        title=f"{record['length']:,} tokens, {record['windows']} windows, {record['tokens']:,} predictions{scored}",
        caption=f"±: standard error, from {spread}. Everything selected equals dense: logits within "
        f"{check['max_abs_error']:.1e} (allowed {check['tolerance']:.1e}). Recall: share of the attention "
        "mass; normalised: 0 a window, 1 the keys of most mass. "
        f"Decoding in torch: {record['tokens_per_s_dense']:.1f} tokens/s dense, "
        f"{record['tokens_per_s_sparse']:.1f} sparse.",
        caption_justify="left",
    )  # fmt: skip
    columns = ["selection", "k", "loss", "vs dense", "perplexity", "KL", "top-1", "recall", "normalised"]
    if record["base"]:
        columns += ["vs base", "KL, base"]
    for name in columns:
        table.add_column(name, justify="left" if name == "selection" else "right")
    recalls = {item["k"]: item for item in record["attention"]}
    shown = [("dense", "all", dense), *([("dense, base", "all", record["base"])] if record["base"] else [])]
    for rung in (*RUNGS, "auto"):
        shown += [(rung, describe_topk(r["k"]), r) for r in record["ladder"] if r["rung"] == rung]
    for rung, k, row in shown:
        mass = recalls.get(row.get("k")) if not isinstance(row.get("k"), list) else None
        recall = {"best": "best", "trained": "recall", "window": "window"}.get(rung)
        table.add_row(
            rung,
            k,
            f"{row['loss']:.4f}",
            _increase(row) if row is not dense else "",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}" if row is not dense else "",
            f"{row['top1']:.1%}" if row is not dense else "",
            f"{mass[recall]:.3f}" if mass and recall else "",
            f"{mass['normalised']:.3f}" if mass and rung == "trained" else "",
            *([_increase(row["from_base"]), f"{row['from_base']['kl']:.4f}"] if record["base"] else []),
        )
    return table


def _increase(row: Record) -> str:
    error = row["increase_error"]  # None: one block of tokens tells no spread
    return f"{row['increase']:+.2%}" + (f" ± {error:.2%}" if error is not None else "")


def task_table(records: Sequence[Record]) -> Table:
    """Scores of dense and sparse in one task, a row per length; in brackets the nats per token of the right answer."""
    name, samples = records[0]["task"], records[0]["samples"]
    ks = list(dict.fromkeys(record["k"] for record in records))
    table = Table(
        title=f"{name}, {samples} samples each: share of the expected strings in the answer (nats per token of those)"
    )
    for column in ("tokens", "dense", *(f"k = {k}" for k in ks)):
        table.add_column(column, justify="right")
    for length in dict.fromkeys(record["length"] for record in records):
        row = {r["k"]: r for r in records if r["length"] == length}
        cells = [(row[ks[0]], "dense"), *((row[k], "sparse") for k in ks)]
        table.add_row(f"{length:,}", *(f"{r[of]:.2f} ({r[f'{of}_nats']:.2f})" for r, of in cells))
    return table
