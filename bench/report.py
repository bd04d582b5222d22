"""The HTML report: one file, pictures inside, no network, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from bench import summary, tables
from bench.summary import Record

TEMPLATE = "report.html.j2"
CAPTIONS = {
    "latency.png": "Time of one call against the context. Bands: p10 to p90 of the alternating runs.",
    "speedup.png": "Speed-up over the strongest dense operator. Dotted: what the floors predict. ×: the crossover.",
    "memory.png": "Peak resident memory that an engine adds to its process: weights, caches, workspace.",
    "operators.png": "Where a decoding step spends its time, by ONNX Runtime's profiler.",
}
LIMITS = (
    "Timings are of one machine, named above, under whatever else ran on it; the spread stands beside every median.",
    "Floors count each weight and each visible or selected cache row once, and no intermediate result; the rates are "
    "those of plain copies and of a plain matrix product, so a quantised engine may exceed the floor by operations.",
    "Loss and agreement are over the number of tokens stated, of one text: they show that the engines say the same, "
    "not how good the model is.",
)

RANDOM_CACHES = (
    "Random caches: contexts were filled with random values instead of a computed prompt. Times are real, selections "
    "are not the model's, so no agreement, loss or time to first token is given for them."
)


def write(
    path: Path,
    records: Sequence[Record],
    pictures: Sequence[Path],
    *,
    proofs: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Writes the report. proofs: what was verified before anything was timed. facts: machine, versions, command."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.undefined = jinja2.StrictUndefined
    measured = summary.pairs(records)
    limits = [*LIMITS, RANDOM_CACHES] if any(pair.sparse["caches"] == "random" for pair in measured) else LIMITS
    images = [
        {
            "data": base64.b64encode(picture.read_bytes()).decode(),
            "caption": CAPTIONS[picture.name],
            "name": picture.stem,
        }
        for picture in pictures
    ]
    rates = {record["rates"]["how"]: record["rates"] for record in summary.of_kind(records, "timing")}
    path.write_text(
        environment.get_template(TEMPLATE).render(
            headline=summary.sentence(measured),
            proofs=proofs,
            tables=tables.all_tables(records),
            images=images,
            facts=facts,
            rates=rates.values(),
            limits=limits,
            sources=sources(records),
        ),
        encoding="utf-8",
    )


def sources(records: Sequence[Record]) -> list[dict[str, str]]:
    """The engines that were timed, with the hashes of what they were built from."""
    found = {
        record["engine"]: {
            "engine": record["engine"],
            "core": record["core"],
            "precision": record["precision"],
            "graph": record["source"]["sha256"][:16],
            "weights": record["source"].get("weights_sha256", "")[:16],
        }
        for record in summary.of_kind(records, "timing")
    }
    return list(found.values())
