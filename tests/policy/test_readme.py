"""Commands in the documents exist: make targets, verbs, overrides, files."""

import re
import shlex

import pytest
import snippets
from snippets import blocks, documents

from dirotq.cli import command_line
from dirotq.pipeline.compress import CONFIG
from dirotq.pipeline.config import compose_config


def commands(root):
    """(document, command) of each line in a block that is not run, and `make ...` in the text."""
    for name in documents(root):
        text = (root / name).read_text()
        for block in blocks(text):
            if block.language == "bash" and block.reasons:  # test_snippets.py runs the others
                yield from ((name, command) for command in snippets.commands(block.code))
        for command in re.findall(r"`((?:make|dirotq) [^`\n]*)`", text):
            yield name, command


def pytest_generate_tests(metafunc):
    if "command" in metafunc.fixturenames:
        found = sorted(set(commands(metafunc.config.rootpath)))
        metafunc.parametrize(("document", "command"), found, ids=[f"{d}: {c}" for d, c in found])


def test_command_exists(document, command, root):
    if "<" in command or "..." in command or "[" in command.split(" ")[-1][:1]:
        pytest.skip("a pattern, not a command")
    words = [word for word in shlex.split(command) if word]
    if "MODEL=FOLDER" in words or "model=FOLDER" in words:
        pytest.skip("needs a folder of the reader's")
    if words[0] == "make":
        variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        targets = [word for word in words[1:] if "=" not in word]
        phony = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(phony[1].split())
        if {"compress", "plan"} & set(targets):
            model = variables.get("MODEL", "tiny_flux")
            compose_config([f"model={model}", *shlex.split(variables.get("ARGS", ""))], CONFIG)
    elif words[0] == "dirotq":
        assert words[1] in command_line()[1], f"{words[1]} is no verb"
        multirun = {"-m", "--multirun"} & set(words)
        if words[1] in ("compress", "plan") and not multirun:
            compose_config([word for word in words[2:] if word != "--help"], CONFIG)
    elif words[0] in ("python", "python3") and words[1:2] and words[1].endswith(".py"):
        assert (root / words[1]).is_file()


def test_every_promise_names_tests_that_exist(root):
    text = (root / "docs" / "reliability.md").read_text()
    promises = text[text.index("## Promises") : text.index("## What is not promised")]
    rows = [row for row in promises.splitlines() if row.startswith("|") and "---" not in row]
    held = [row for row in rows if "held by" not in row]
    assert len(held) > 30
    for row in held:
        files = re.findall(r"`([\w/]+\.py)`", row)
        assert files, row
        found = [len(list((root / "tests").rglob(file))) for file in files]
        assert set(found) == {1}, row  # a name that two files have needs its folder
