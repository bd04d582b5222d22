"""Prose in two languages for training and evaluation: the Debian Administrator's Handbook as JSON lines.

    apt download debian-handbook && dpkg -x debian-handbook_*.deb out/handbook
    python -m bench.handbook out/handbook/usr/share/doc/debian-handbook/html --out out/handbook

Writes en-US.jsonl and zh-CN.jsonl, a record per chapter in the schema of deepctrl-sft-data ("continue this chapter"),
and mixed.jsonl: both, and as many characters of the standard library's modules. Chapters held out
(train/documents.py) are the same in all three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from dsa_export.cli import UserError, console, path, run
from dsa_export.files import write_atomically
from train.documents import stdlib_records

ASK = {"en-US": "Continue this chapter of the handbook.", "zh-CN": "请续写手册的这一章。"}
SHORTEST_CHAPTER = 3000  # characters
SHORTEST_MODULE, MODULES = 4000, 1_900_000  # characters of a record, and of all of them
BLOCKS = frozenset(["p", "li", "h1", "h2", "h3", "h4", "dd", "dt", "div", "pre"])
LEFT_OUT = frozenset(["script", "style", "head", "nav"])


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.left_out = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.left_out += tag in LEFT_OUT
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.left_out -= tag in LEFT_OUT

    def handle_data(self, data: str) -> None:
        if not self.left_out:
            self.parts.append(data)


def plain_text(page: str) -> str:
    """The text of an HTML page, a line per block."""
    parser = _Text()
    parser.feed(page)
    return re.sub(r"\s*\n\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", "".join(parser.parts))).strip()


def chapters(folder: Path, ask: str) -> list[str]:
    """A record for every page of the folder that is long enough; the table of contents is none."""
    records = []
    for page in sorted(folder.glob("*.html")):
        text = plain_text(page.read_text(encoding="utf-8", errors="replace"))
        if len(text) > SHORTEST_CHAPTER and page.stem != "index":
            begun = text.find("\n", 200) + 1
            record = {"instruction": ask, "input": text[:begun], "output": text[begun:], "history": []}
            records.append(json.dumps(record, ensure_ascii=False))
    return records


def modules() -> list[str]:
    """Records of the standard library, of so many characters in all."""
    records, size = [], 0
    for line in stdlib_records().read_text(encoding="utf-8").split("\n"):
        if len(line) >= SHORTEST_MODULE and size <= MODULES:
            records.append(line)
            size += len(line)
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.handbook", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("html", type=path, help="folder that holds en-US and zh-CN")
    parser.add_argument("--out", type=path, default=Path("out/handbook"), metavar="DIR", help="[%(default)s]")
    args = parser.parse_args(argv)
    written: dict[str, list[str]] = {}
    for language, ask in ASK.items():
        written[language] = chapters(args.html / language, ask)
        if not written[language]:
            raise UserError(f"no chapters in {args.html / language}: name the html folder of debian-handbook")
    written["mixed"] = [*modules(), *(record for records in written.values() for record in records)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in written.items():
        records.sort(key=lambda record: hashlib.blake2b(record.encode()).digest())
        write_atomically(args.out / f"{name}.jsonl", "\n".join(records) + "\n")
        console.print(f"Wrote {args.out / name}.jsonl: {len(records)} records")


if __name__ == "__main__":
    run(main)
