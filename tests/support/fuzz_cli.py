"""Command lines of all kinds for the toy line: whatever is typed, people get an answer.

``check_command_line`` holds one of them, in this process and a folder of its own, against what the
command line promises. It needs no torch.
"""

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import strategies as st

from dirotq.cli import main

CONFIG = "toyline.conf"
SECRET = "sk-proj-Zq81XyWvuTsrQponM26"
VERBS = (
    "compress", "plan", "explain", "sites", "list", "compare", "push", "pull", "verify", "gc",
    "generate", "tune", "doctor",
)  # fmt: skip

NASTY = st.text(
    alphabet="abé/.\\'\"${}[]()=,~ #:;&|<>*?!@%^-+_\n\t\0\x85\u2028\udcff0", max_size=12
).filter(lambda text: not text.lstrip("'\" ").startswith("/") and ".." not in text)
PATHS = st.one_of(
    NASTY,
    st.sampled_from(
        ["inside", "a b/(1) [x]", "it's", "é/ü", "a=b,c", "~", "~/x", "~nosuchuser/x", "${x}",
         "a${b", "${oc.env:HOME}", "null", "123", "1e3", "true", "file", "file/x", "", " ",
         "/dev/null/x", "/proc/nope", "x" * 300, "gs://bucket", "memory://x", "[a]", "{a: b}"]
    ),
)  # fmt: skip
VALUES = st.one_of(
    NASTY,
    PATHS,
    st.integers(-3, 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "nan", "inf", "???", "[1]", "{a: 1}", "2,3", "[2",
                     "choice(2,3)", "range(1,3)", "${squares.power}", "${nix}", "2.0", "3"]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(
        ["store", "store_remote", "store_push", "model", "model.path", "model.offset",
         "numbers.count", "numbers.trouble",
         "numbers.ledger", "squares.power", "squares.powr", "squares", "until", "force", "methd",
         "pipeline", "pipeline.squares", "executor", "executor._target_", "squares._target_",
         "hydra/launcher", "hydra.run.dir", "hydra.job.chdir", "a.b.c", "model@x", "x.api_key"]
    ),
    NASTY,
)  # fmt: skip
OVERRIDES = st.builds(
    lambda mark, key, value: f"{mark}{key}={value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    KEYS,
    VALUES,
)
SECRETS = st.sampled_from(
    [f"+judge.extra.api_key={SECRET}", f"model.path=https://user:{SECRET}@host/x",
     f"squares.power={SECRET}", f"--token={SECRET}", f"HF_TOKEN={SECRET}", SECRET,
     f"+x={{password: {SECRET}}}", f"hydra.job.env_set.API_KEY={SECRET}", f"store=x?token={SECRET}"]
)  # fmt: skip
FLAGS = st.sampled_from(
    ["-m", "--multirun", "--debug", "--help", "-h", "--version", "--cfg", "job", "--yes", "--keep",
     "-1", "99", "--remove", "--prompt", "--seed", str(2**64), "--steps", "0", "--out", "--store",
     "--store=", "--nope", "--info", "--config-dir", "--config-name=x", "~squares", "+", "=", "~"]
)  # fmt: skip
SANE = st.sampled_from(
    ["squares.power=3", "numbers.count=3", "model=large", "until=squares", "force=[numbers]",
     "numbers.trouble=numbers", "numbers.trouble=bug", "numbers.trouble=disk", "store=a b"]
)  # fmt: skip
"""What can be read, so that one odd word among them gets far."""
CONFIGURED = st.builds(
    lambda verb, sane, odd, place: [verb, *sane[:place], odd, *sane[place:]],
    st.sampled_from(["compress", "compress", "plan", "explain"]),
    st.lists(SANE, max_size=3, unique_by=lambda word: word.partition("=")[0]),
    st.one_of(OVERRIDES, OVERRIDES, FLAGS),
    st.integers(0, 3),
)
ANY = st.builds(
    lambda verb, words: [verb, *words],
    st.one_of(st.sampled_from(VERBS), NASTY),
    st.lists(st.one_of(OVERRIDES, FLAGS, PATHS, SECRETS), max_size=4),
)
COMMAND_LINES = st.one_of(CONFIGURED, CONFIGURED, ANY)


def check_command_line(words: Sequence[str]) -> None:
    """Run ``words`` and raise AssertionError unless they end as promised.

    Status 0, or 2 with something said (1 only where a fault was ordered); no traceback unless asked
    for; nothing written outside of the folder, which HOME, too, is; a secret shown nowhere.
    """
    with _folder() as folder:
        status, out, err = _run(words)
        said = f"{list(words)!r} ended with {status}:\n{out}\n{err}"
        ordered = any("bug" in word for word in words)
        assert status in ((0, 1, 2) if ordered else (0, 2)), said
        assert "Traceback" not in err or "--debug" in words, said
        assert status == 0 or err.strip(), said
        assert SECRET not in out + err, said
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                assert SECRET.encode() not in file.read_bytes(), f"{said}\n{file} holds the secret"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A current folder and HOME to make a mess in; what is written beside it fails the test."""
    before = os.getcwd()  # noqa: PTH109
    keep = {name: os.environ.get(name) for name in ("HOME", "DIROTQ_STORE", "HYDRA_FULL_ERROR")}
    with tempfile.TemporaryDirectory(prefix="dirotq-fuzz-") as name:
        outer = Path(name)
        folder = outer / "inside"
        folder.mkdir()
        (folder / "file").write_text("a file")
        os.environ["HOME"] = str(folder)
        os.environ.pop("DIROTQ_STORE", None)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            for variable, value in keep.items():
                os.environ.pop(variable, None)
                if value is not None:
                    os.environ[variable] = value
        assert [path.name for path in outer.iterdir()] == ["inside"], list(outer.iterdir())


def _run(words: Sequence[str]) -> tuple[object, str, str]:
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(words), config=CONFIG)
    except SystemExit as left:
        return left.code, out.getvalue(), err.getvalue()
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers  # Hydra set up its own
        root.setLevel(level)
        logging.raiseExceptions = raising
    raise AssertionError(f"{list(words)!r} came back without SystemExit")
