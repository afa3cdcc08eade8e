"""Hydra's and OmegaConf's errors in the words of this project: what was wrong, what is allowed."""

import re
from collections.abc import Callable

from omegaconf import DictConfig

from dirotq.pipeline.settings import close_to, moved, no_such_setting

EXTRAS = {
    "joblib": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray",
    "optuna": "search",
}  # fmt: skip
"""Launchers and sweepers, and the extras of this package that install them."""
NOISE = re.compile(
    r"full_key:|object_type=|reference_type=|See https://|Config search path|provider="
)


def reworded(error: BaseException, tree: Callable[[], DictConfig] | None = None) -> str:
    """Return one paragraph for whatever Hydra or OmegaConf say about overrides.

    tree  makes the configuration without overrides, to look for names that are meant
    """
    text = str(error)
    whole = f"{text}\n{error.__cause__ or ''}"
    for pattern, words in _WORDS:
        if found := re.search(pattern, whole, re.DOTALL):
            return words(*found.groups())
    if found := re.search(r"Could not override '([^']*)'", text):
        return _unknown(found[1], tree)
    parts = [*text.splitlines(), *str(error.__cause__ or "").splitlines()]
    said = [part.strip() for part in parts if part.strip() and not NOISE.search(part)]
    key = re.search(r"full_key: (\S+)", text)
    prefix = f"{key[1]}: " if key else ""
    return prefix + ("; ".join(dict.fromkeys(said)) or type(error).__name__)


def _no_choice(path: str, group: str, options: str) -> str:
    name, known = path.removeprefix(f"{group}/"), options.split()
    hint = close_to(name, known)
    if group == "prompts" and not hint:
        hint = " a file is given as prompts.calibration.path=FILE and prompts.heldout.path=FILE;"
    if name in EXTRAS:
        hint = f" it comes with an extra: pip install 'dirotq[{EXTRAS[name]}]';"
    return f"{group}={name}: there is no such choice;{hint} {group} has {', '.join(known)}"


def _ambiguous(override: str) -> str:
    name, _, value = override.partition("=")
    return (
        f"{override}: commas are for sweeps, `dirotq compress -m {override}`; a list is written "
        f"{name}=[{value}], and text with commas in quotes: \"{name}='{value}'\""
    )


def _not_a_choice(kind: str) -> str:
    chosen = "null" if kind == "NoneType" else f"a {kind}"
    return (
        f"a group of the configuration can't be {chosen}: choose one of its names "
        "(`dirotq compress --help` lists them), or leave a group out with ~GROUP"
    )


_WORDS: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"Could not find '([^']+)'.*Available options in '([^']*)':(.*?)Config search",
     _no_choice),
    (r"Could not (?:find|load) '(.+?)/([^/']*)'",
     "{}={}: there is no such choice; `dirotq compress --help` lists them".format),
    (r"An item is already at '([^']*)'",
     "+{0}=...: {0} is there already; write {0}=... without the +".format),
    (r"^(\S+) appears more than once in the final defaults list",
     "+{0}=...: {0} is chosen already; write {0}=... without the +".format),
    (r"^Multiple values for (\S+)\.",
     "+{0}=...: {0} is chosen already; write {0}=... without the +".format),
    (r"Could not delete from config\. '([^']*)' does not exist",
     "~{0}: there is nothing called {0} to leave out".format),
    (r"Error merging override ([^=]+)=.*Cannot merge DictConfig with ListConfig",
     "{0} is a mapping, no list: write +{0}.NAME=VALUE, or {0}={{NAME: VALUE}}".format),
    (r"Ambiguous value for argument '(.*?)'\n", _ambiguous),
    (r"Config group override must be a string or a list\. Got (\w+)", _not_a_choice),
)  # fmt: skip


def _unknown(name: str, tree: Callable[[], DictConfig] | None) -> str:
    if name.startswith("hydra.") or tree is None:
        return f"{name}: there is no such setting; `dirotq compress --cfg all` prints them all"
    node: object = tree()
    parts = name.split(".")
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if not isinstance(node, DictConfig):
            return f"{name}: there is no such setting; {above} is a value and has no parts"
        if part not in node:
            known = [str(key) for key in node if not str(key).startswith("_")]
            return str(no_such_setting(above, part, known, moved=moved(node, above, part)))
        node = node.get(part)
    return f"{name}: it can't be set here"
