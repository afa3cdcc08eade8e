"""Blocks of commands and Python in README and docs do what they say, on a tiny pipeline.

They run in a folder that holds what readers have, by the names that the documents use: FOLDER (a
16-bit pipeline), PACKED (a packed one), PROMPTS.jsonl, two LoRAs, docs/own.md's method, the store
``artifacts`` with a run, whose names take the place of STAGE/FINGERPRINT. Not as written:

- Sizes are small: ``overrides`` of tests/support/tiny_line.py are added, but for settings that the
  command has itself, and images are 32 pixels wide.
- ``compress`` with settings of its own is run as ``plan``; a sweep with its first values, and with
  its last. That reads every setting, the model and the machine, and says what would run.
- A command that several documents have is run once.
"""

import functools
import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from snippets import RUN, blocks, commands, documents, faults
from tiny_line import CALL, LINE, WIDTH, prompt_file

import dirotq
from dirotq.cli import main

EXPORTABLE = ("method=convrot", "weight_format=int4_channel", "act_format=int4_token")
NEEDS = {"docs/lora.md": "peft"}
"""Packages of the development extra that a document needs."""


def text_of(root, document):
    return (root / document).read_text()


def is_run(block):
    return block.language in RUN and not block.reasons


def pytest_generate_tests(metafunc):
    root = metafunc.config.rootpath
    if "document" in metafunc.fixturenames:
        metafunc.parametrize("document", documents(root))
    if "runnable" in metafunc.fixturenames:
        found = [d for d in documents(root) if any(map(is_run, blocks(text_of(root, d))))]
        metafunc.parametrize("runnable", found)


@pytest.fixture(scope="session")
def made(folder, root, tiny_root, tmp_path_factory):
    """{stage: artifact} of a run in the reader's folder, three levels above each of them."""
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(folder, here / "FOLDER")
    shutil.copy(prompt_file(tiny_root), here / "small.jsonl")
    rows = (json.dumps({"prompt": f"{i} small red stars"}) + "\n" for i in range(64))
    (here / "PROMPTS.jsonl").write_text("".join(rows))
    for name in ("style", "detail"):
        q = "transformer.transformer_blocks.0.attn.to_q"
        shapes = {f"{q}.lora_A.weight": (4, WIDTH), f"{q}.lora_B.weight": (WIDTH, 4)}
        save_file({k: torch.ones(s) / 10 for k, s in shapes.items()}, here / f"{name}.safetensors")
    (method,) = (b.code for b in blocks(text_of(root, "docs/own.md")) if b.language == "yaml")
    (here / "mine" / "method").mkdir(parents=True)
    (here / "mine" / "method" / "mine.yaml").write_text(method)
    with pytest.MonkeyPatch.context() as patch:
        readers(patch, here)
        made = dirotq.compress("FOLDER", *small_words())
        packed = dirotq.compress("FOLDER", *small_words(), *EXPORTABLE, until="pack").folder
    shutil.copytree(packed, here / "PACKED")
    return made.artifacts


def readers(patch, here):
    """Be where the reader is."""
    patch.chdir(here)
    patch.setenv("DIROTQ_CACHE", str(here / "cache"))
    patch.delenv("DIROTQ_STORE", raising=False)


@pytest.fixture
def small(made, monkeypatch):
    """The reader's folder is the current one, pipelines draw small images, runs are small."""
    from diffusers import FluxPipeline

    readers(monkeypatch, made["pack"].path.parents[2])
    whole, compress = FluxPipeline.__call__, dirotq.compress

    @functools.wraps(whole)
    def call_small(self, *given, **named):
        return whole(self, *given, **CALL | named)

    def compress_small(model, *words, **named):
        return compress(model, *words, *small_words(), **named)  # they win: rank 16 is cached

    monkeypatch.setattr(FluxPipeline, "__call__", call_small)
    monkeypatch.setattr(dirotq, "compress", compress_small)


@pytest.fixture(scope="session")
def done():
    """Commands that an earlier document has run."""
    return set()


def small_words(own=()):
    """Settings that make a run small, but for those that ``own`` words have, or have chosen, and of
    what a preset leaves out.
    """
    keys = {word.lstrip("+~").partition("=")[0] for word in own}
    keys |= {"capture", "rank"} if "preset" in keys else set()
    wanted = [f"prompts.{name}.path=small.jsonl" for name in ("calibration", "heldout")]
    idle = ("prompts.calibration.",) if "preset" in keys else ()
    if "preset" in keys and "until" not in keys:
        idle += ("prompts.heldout.", "reference.", "validate.")
    return [
        w
        for w in (*wanted, *LINE)
        if not {w.partition("=")[0], w.partition(".")[0]} & keys
        if not w.startswith(idle)
    ]


def as_run(command, root, tmp_path):
    """The commands to run in the place of one, as words behind `dirotq`."""
    words = shlex.split(command)
    if words[0] == "make":  # what it would run
        asked = ["make", "-n", *words[1:], f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if "/bin/dirotq " in line]
        words = shlex.split(line)
    program, verb, *rest = words
    assert program.endswith("dirotq"), f"{command}: mark it, or name the program in this test"
    if verb not in ("compress", "plan", "explain") or "--cfg" in rest:
        return [(verb, *rest)]
    own = [word for word in rest if not word.startswith("-")]
    if verb == "compress" and own == ["model=FOLDER"]:
        return [(verb, *rest, *small_words())]
    verb = "plan" if verb == "compress" else verb
    ends = dict.fromkeys(tuple(one_value(word, end) for word in own) for end in (0, -1))
    # Embedded models have prompts and sizes of their own.
    return [(verb, *e, *(small_words(e) if "model=FOLDER" in e else ())) for e in ends]


def one_value(word, place):
    """A word, or of a sweep the one with the first (0) or last (-1) of its values."""
    name, _, value = word.partition("=")
    return word if value[:1] in ("[", "{") else f"{name}={value.split(',')[place]}"


def test_every_block_is_run_or_says_why_not(document, root):
    assert faults(text_of(root, document)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```bash\ndirotq list\n```", 0),
        ("<!-- not run: gpu, hub -->\n```bash\nmake tune\n```", 0),
        ("<!-- not run: gpu -->\n\n```python\nx\n```", 0),
        ("<!-- not run: tired -->\n```bash\nmake tune\n```", 1),
        ("<!-- not run: gpu -->\n```text\nx\n```", 1),
        ("```sh\ndirotq list\n```", 1),
        ("    dirotq list", 1),
        ("- `dirotq list`\n    - dirotq lists", 0),
        ("```\n    dirotq list\n```", 0),
    ],
)
def test_what_is_wrong_with_a_block(text, found):
    assert len(faults(text)) == found


def test_a_reason_is_of_the_next_block_only():
    text = "<!-- not run: gpu -->\n```bash\na\n```\n```bash\nb  # c\n# d\ne \\\n  f\n```"
    first, second = blocks(text)
    assert (first.reasons, first.line) == (("gpu",), 3)
    assert second.reasons == () and commands(second.code) == ["b", "e    f"]
    with pytest.raises(ValueError, match="line 1 has no end"):
        list(blocks("```bash\na"))


def test_blocks_run(runnable, root, made, small, done, tmp_path, capsys):
    """In one Python for a document: a block may use what an earlier one made."""
    pytest.importorskip(NEEDS.get(runnable, "dirotq"))
    names = {"__name__": "__main__"}
    for block in filter(is_run, blocks(text_of(root, runnable))):
        code = re.sub(r"(\w+)/FINGERPRINT", lambda m: str(made[m[1]]), block.code)
        where = f"{runnable}, line {block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + code, str(root / runnable), "exec"), names)
            continue
        for command in commands(code):
            for words in filter(lambda words: words not in done, as_run(command, root, tmp_path)):
                done.add(words)
                with pytest.raises(SystemExit) as left:
                    main(words)
                said = capsys.readouterr()
                assert not left.value.code, f"{where}: {command}\n{said.out}{said.err}"
