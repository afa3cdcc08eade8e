"""Hydra reads, chooses and merges thirty YAML files for each configuration: a tenth of a second.

Here it does that once for each choice of groups. Single settings it applies itself, every time.
Folders of a test's own are read anew: what lies there changes.
"""

import dataclasses
import functools
import io
import pickle
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import IO, Any

import omegaconf
from hydra._internal import config_loader_impl as hydra
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf


def composed_once(put: Callable[[Any, str, Any], None]) -> None:
    """Have Hydra keep what it made of the same files; ``put`` is a ``setattr``."""
    put(OmegaConf, "load", staticmethod(_parsed_once(OmegaConf.load)))
    put(omegaconf.base, "parse", functools.cache(omegaconf.base.parse))  # of ${interpolations}
    put(hydra, "create_defaults_list", _chosen_once(hydra.create_defaults_list))
    loader = hydra.ConfigLoaderImpl
    merge = loader._compose_config_from_defaults_list
    put(loader, "_compose_config_from_defaults_list", _merged_once(merge))


def _parsed_once(parse: Callable[[IO[str]], Any]) -> Callable[[str | Path | IO[str]], Any]:
    """An ``OmegaConf.load`` that copies what it made of the same text before."""
    parsed: dict[str, bytes] = {}

    def load(file: str | Path | IO[str]) -> Any:
        text = Path(file).read_text("utf-8") if isinstance(file, str | Path) else file.read()
        if text not in parsed:
            parsed[text] = pickle.dumps(parse(io.StringIO(text)))
        return pickle.loads(parsed[text])  # noqa: S301 (a fifth of the time of deepcopy)

    return load


def _chosen_once(choose: Callable[..., DefaultsList]) -> Callable[..., DefaultsList]:
    """A ``create_defaults_list`` that finds the files of the same groups once."""
    chosen: dict[Hashable, DefaultsList] = {}

    def list_of(
        repo: IConfigRepository,
        config_name: str | None,
        overrides_list: list[Override],
        **how: bool,
    ) -> DefaultsList:
        tree = _package_tree(repo)
        if tree is None or any(word.is_sweep_override() for word in overrides_list):
            return choose(repo, config_name, overrides_list, **how)
        single = [w for w in overrides_list if _is_single(w, repo)]
        groups = [w for w in overrides_list if not _is_single(w, repo)]
        key = (tree, config_name, *how.items(), *(w.input_line for w in groups))
        if key not in chosen:
            chosen[key] = choose(repo, config_name, groups, **how)
        return dataclasses.replace(chosen[key], config_overrides=single)

    return list_of


def _merged_once(merge: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """A ``_compose_config_from_defaults_list`` that merges the same files once."""
    merged: dict[Hashable, bytes] = {}

    def config(
        loader: Any, defaults: Sequence[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        tree = _package_tree(repo)
        if tree is None:
            return merge(loader, defaults=defaults, repo=repo)
        key = (tree, *(dataclasses.astuple(default) for default in defaults))
        if key not in merged:
            merged[key] = pickle.dumps(merge(loader, defaults=defaults, repo=repo))
        made: DictConfig = pickle.loads(merged[key])  # noqa: S301
        return made

    return config


def _is_single(word: Override, repo: IConfigRepository) -> bool:
    """Whether Hydra takes a word for a setting, not for the choice of a group."""
    return isinstance(word.value(), dict) or not repo.group_exists(word.key_or_group)


def _package_tree(repo: IConfigRepository) -> tuple[str, ...] | None:
    """The places that are searched; None if one is a folder of somebody's."""
    sources = repo.get_sources()
    if any(source.scheme() == "file" for source in sources):
        return None
    return tuple(source.full_path() for source in sources)
