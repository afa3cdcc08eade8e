"""Every configuration composes, its values are the fields of what it builds, and it wires up."""

import dataclasses

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from dirotq.errors import DirotqError
from dirotq.pipeline import dag
from dirotq.pipeline.config import build, compose_config

STAGES = ["capture", "basis", "rank", "gptq", "fuse", "pack", "reference", "validate"]


def compose(*overrides):
    return compose_config(overrides, "dirotq.conf")


def choices(root):
    """group=option of every file in the tree."""
    conf = root / "conf"
    for path in sorted(conf.rglob("*.yaml")):
        *group, option = path.relative_to(conf).with_suffix("").parts
        if group[:1] == ["experiment"]:
            yield f"experiment={'/'.join([*group[1:], option])}"
        elif group:
            yield f"{'/'.join(group)}={option}"


def pytest_generate_tests(metafunc):
    if "choice" in metafunc.fixturenames:
        metafunc.parametrize("choice", list(choices(metafunc.config.rootpath)))


def targets(node, name=""):
    """Every node with a ``_target_``, with its dotted name. Interpolations are not followed."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield name, node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{name}.{key}".lstrip("."))


def is_stage(cls):
    return hasattr(cls, "version") and hasattr(cls, "run")


def test_the_stages_in_their_order():
    cfg = compose()
    wiring = OmegaConf.to_container(cfg.pipeline)
    assert dag.order(wiring) == STAGES
    for name in STAGES:
        assert is_stage(get_class(cfg[name]._target_))


def test_slots_fit_the_wires(tmp_path):
    cfg = compose()
    wiring = OmegaConf.to_container(cfg.pipeline)
    for name, slots in wiring.items():
        run = get_class(cfg[name]._target_).run
        assert set(run.__kwdefaults__ or {}) == set()
        count = run.__code__.co_kwonlyargcount
        first = run.__code__.co_argcount
        assert set(run.__code__.co_varnames[first : first + count]) == set(slots), name


def test_every_choice_composes(choice, tmp_path):
    needed = {
        "model=local": [f"model.path={tmp_path}"],
        "judge=local": [f"judge.backend.path={tmp_path}"],
        "judge=openai": ["judge.backend.model=NAME"],
    }
    cfg = compose(choice, *needed.get(choice, []))
    assert not OmegaConf.missing_keys(cfg)
    OmegaConf.to_container(cfg, resolve=True)  # every interpolation leads somewhere


def test_values_are_the_fields_of_what_they_build(choice):
    """A field without a YAML line could not be set from the command line; values live in YAML."""
    found = list(targets(compose(choice)))
    assert found
    for name, node in found:
        cls = get_class(node._target_)
        if dataclasses.is_dataclass(cls):
            fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
            assert set(node) - {"_target_"} == set(fields), name
            if is_stage(cls):
                for field in fields.values():
                    assert field.default is dataclasses.MISSING, f"{name}.{field.name}"


def test_every_choice_instantiates(choice):
    """Building checks values and imports classes; it needs no GPU, no network and no model."""
    cfg = compose(choice)
    if choice == "model=local":
        pytest.skip("needs the folder that it is for")
    for name in STAGES:
        try:
            instantiate(cfg[name], _convert_="all")
        except InstantiationException as error:
            assert isinstance(error.__cause__, DirotqError), error
            pytest.fail(f"{choice}: {name} refuses its own configuration: {error.__cause__}")


def test_the_default_line_plans(store_root):
    line = build(compose())
    assert [step.name for step in line.steps] == STAGES
    assert line.store.root == store_root
    assert not store_root.exists()


def test_the_judged_line_plans(tmp_path):
    openai = ["judge=openai", "judge.backend.model=NAME"]
    local = ["judge=local", f"judge.backend.path={tmp_path}"]
    (tmp_path / "config.json").write_text("{}")
    keys = set()
    for judge in ([], openai, local):
        line = build(compose("pipeline=judged", *judge))
        assert [step.name for step in line.steps] == [*STAGES, "judge"]
        keys.add(line.steps[-1].fingerprint)
        assert line.steps[:-1] == build(compose()).steps
    assert len(keys) == 3
