"""The README and docs/ are true: their commands exist with the flags they use, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*COMMANDS, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("plugins/*/README.md"))]


PROGRAM = r"python (?:-m [\w.]+|[\w/]+\.py)"


def commands() -> list[str]:
    """Every call of a program in an indented block, also in loops and by the name of a shell function."""
    found: set[str] = set()
    for document in COMMANDS:
        text = document.read_text().replace("\\\n", " ")
        code = "\n".join(line for line in text.splitlines() if line.startswith("    "))
        for name, program in re.findall(rf"(\w+)\(\) {{ ({PROGRAM})", code):
            if name != "engine":  # calls two programs
                code = re.sub(rf"(?<=[ \n]){name} (?=-)", f"{program} ", code)
        found.update(call.strip() for call in re.findall(rf"{PROGRAM}[^;|#}}\n]*", code))
    return sorted(found)


def anchors(document: Path) -> set[str]:
    """Of a document's headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def help_of(program: str) -> str:
    """What `program --help` prints, in this process: importing torch for each would take longer than all else."""
    name = program.split()[-1].removesuffix(".py").replace("/", ".")
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, "--help"]),
        contextlib.redirect_stdout(output),
        pytest.raises(SystemExit) as end,
    ):
        module.main()
    assert not end.value.code
    return output.getvalue()


@pytest.mark.parametrize("command", commands())
def test_every_command_and_flag_exists(command):
    program = re.match(r"python (-m \S+|\S+\.py)", command)
    assert program, command
    text = help_of(program.group(0))
    for flag in re.findall(r"--[a-z0-9-]+", command):
        assert re.search(rf"{flag}(?![a-z0-9-])", text), f"{flag} is not an option of {program.group(0)}"


def test_the_two_commands_stand_at_the_top_and_exist():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    make ")]
    targets = [line.split()[1] for line in lines]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text()):
        if "://" in target:
            continue
        place = document.parent / target if target else document
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"
