"""The prose of the quality tables: pages to records."""

from __future__ import annotations

import json

import pytest

from bench import handbook
from dsa_export.cli import UserError

PAGE = "<html><head><title>no</title></head><body><script>x()</script><h1>Title</h1>{}</body></html>"


def test_pages_become_records(tmp_path, monkeypatch):
    paragraphs = "".join(f"<p>Paragraph {i} of <b>some</b>  words.</p>" for i in range(200))
    for language in handbook.ASK:
        folder = tmp_path / "html" / language
        folder.mkdir(parents=True)
        (folder / "long.html").write_text(PAGE.format(paragraphs))
        (folder / "index.html").write_text(PAGE.format(paragraphs))
        (folder / "short.html").write_text(PAGE.format("<p>short</p>"))
    monkeypatch.setattr(handbook, "modules", lambda: ["{}"])
    handbook.main([str(tmp_path / "html"), "--out", str(tmp_path / "out")])
    (record,) = [json.loads(line) for line in (tmp_path / "out/en-US.jsonl").read_text().splitlines()]
    text = record["input"] + record["output"]
    assert text.startswith("Title\nParagraph 0 of some words.\nParagraph 1") and text.endswith("199 of some words.")
    assert len((tmp_path / "out/mixed.jsonl").read_text().splitlines()) == 3

    with pytest.raises(UserError, match="no chapters in"):
        handbook.main([str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_record_of_a_module_is_one_line_whatever_separates_lines_within(tmp_path, monkeypatch):
    line = json.dumps({"text": "a\u2028b\x85c" + "d" * handbook.SHORTEST_MODULE}, ensure_ascii=False)
    path = tmp_path / "stdlib.jsonl"
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    monkeypatch.setattr(handbook, "stdlib_records", lambda: path)
    assert handbook.modules() == [line, line]
