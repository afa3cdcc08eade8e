import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline import provenance as provenance_module
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.secrecy import refuse_secrets, without_secrets

SECRET = "sk-proj-Zq81XyWvuTsrQponM26"
ARGS = [
    f"judge.backend.base_url=https://user:{SECRET}@host/v1",
    f"judge.backend.base_url=https://{SECRET}@host/v1",
    f"judge.backend.base_url=https://host/v1?key={SECRET}",
    "judge.backend.base_url=https://host/v1?token=abcdef",
    f"judge.backend.base_url=https://host/{SECRET}/v1",
    f"judge.backend.api_key_env={SECRET}",
    "judge.backend.api_key_env='hunter two'",
    "+judge.backend.extra.api_key=hunter2",
    "+judge.backend.extra.Authorization=hunter2",
    "+judge.backend.extra={api_key: hunter2}",
    "+judge.backend.extra.user=${oc.env:OPENAI_API_KEY}",
    "+judge.backend.extra.user=hf_abcdefghijklmnopqrst",
    "HF_TOKEN=hunter2",
    "hydra.job.env_set.HF_TOKEN=hunter2",
    "+judge.backend.headers=[Bearer hunter2]",
    "+proxy=http://me:hunter2@proxy:3128",
]
HARMLESS = [
    "judge.backend.api_key_env=OPENAI_API_KEY",
    "judge.backend.api_key_env=my_key",
    "judge.backend.api_key_env=null",
    "judge.backend.max_tokens=800",
    "+judge.backend.extra.max_completion_tokens=800",
    "act_format=int4_token",
    "judge.backend.base_url=http://127.0.0.1:8000/v1",
    "model=org/name@refs/pr/3",
    "model.path=/data/sk-learn-models-of-1999",
    "prompts.heldout.column=author",
]


@pytest.mark.parametrize("arg", ARGS)
@pytest.mark.parametrize("verb", ["compress", "plan", "explain", "gc"])
def test_a_secret_is_refused_before_anything_is_written_or_shown(dirotq, tmp_path, verb, arg):
    result = dirotq(verb, arg, *(["-m"] if verb == "compress" else []))
    assert result.status == 2
    assert "holds what looks like a key or a password" in result.err
    for word in (SECRET, "hunter", "abcdef"):
        assert word not in result.out + result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arg", HARMLESS)
def test_what_only_resembles_one_is_let_through(arg):
    refuse_secrets([arg])


def test_a_secret_in_a_file_of_the_users_is_refused_too(dirotq, tmp_path):
    (tmp_path / "conf" / "squares").mkdir(parents=True)
    mine = "_target_: toyline.stages.Squares\npower: 2\nfail: false\napi_key: hunter2\n"
    (tmp_path / "conf" / "squares" / "mine.yaml").write_text(mine)
    result = dirotq("compress", "--config-dir", str(tmp_path / "conf"), "squares=mine")
    assert result.status == 2
    assert "squares.api_key holds what looks like a key" in result.err
    assert "hunter2" not in result.err
    assert not (tmp_path / "store").exists()


def test_only_fields_that_servers_know_go_into_a_request():
    openai = ["judge=openai", "judge.backend.model=m", "pipeline=judged"]
    build(compose_config([*openai, "+judge.backend.extra.top_p=0.9"], "dirotq.conf"))
    with pytest.raises(ConfigError, match=r"extra\.topp: no server .* did you mean `top_p`\?"):
        build(compose_config([*openai, "+judge.backend.extra.topp=0.9"], "dirotq.conf"))


def test_records_leave_out_what_another_programs_command_line_holds(monkeypatch):
    words = ["mine.py", "--token", "hunter2", "--api-key=hunter2", SECRET, "--steps", "3"]
    shown = without_secrets(words)
    assert shown == [
        "mine.py", "--token", "(not shown)", "api-key=(not shown)", "(not shown)", "--steps", "3",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    assert "hunter2" not in str(provenance_module.provenance(0.0, []))


def test_the_environment_does_not_reach_the_records(dirotq, store, monkeypatch):
    monkeypatch.setenv("LEDGER", str(store.root / "ledger"))
    assert dirotq("compress", "numbers.ledger=${oc.env:LEDGER}").status == 0
    made = store.list()[0]
    assert made.provenance["overrides"] == ["numbers.ledger=${oc.env:LEDGER}"]


def test_a_prompt_may_say_what_it_likes(dirotq, tmp_path):
    result = dirotq("generate", str(tmp_path), "--prompt", "a note: password: hunter2")
    assert "no diffusers pipeline" in result.err
