"""Attacks through a configuration: nothing is called, nothing is read from the environment, no secret is repeated."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.secrets import redacted, refuse_key

# Joined from pieces: no file of the repository holds what looks like a key.
REVISION = "0123456789abcdef" * 2 + "01234567"
KEY = "local-" + REVISION
BASE = ("name=a", "data.root=x", "trainer.max_steps=1")


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pipeline.train", *arguments]
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[3]), **(environment or {})}
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (KEY, "W&B"),
        (f"runs/{REVISION[::-1]}", "the value of WANDB_API_KEY"),
        ("wandb_v1_" + "a1B2" * 5, "W&B"),
        ("AKIA" + "IOSFODNN7EXAMPLE", "AWS"),
        ("ghp_" + "a1B2" * 9, "GitHub"),
        ("hf_" + "a1B2" * 8, "Hugging Face"),
        ("sk-" + "a1B2" * 8, "API key"),
        ("run_sk-proj-" + "a1B2" * 8, "API key"),
        ("eyJhbGciOiJIUzI1" + "NiJ9.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl", "JSON web token"),
        ("runs/glp" + "at-" + "a1B2" * 5, "GitLab"),
        ("x_AIz" + "a" + "a1B2-" * 7, "Google"),
        ("xox" + "b-" + "1234567890", "Slack"),
        ("aws_secret_access_key = " + "a1B2/+" * 7, "password"),
        ("wJalr" + "a1B2/" * 7, "the value of AWS_SECRET_ACCESS_KEY"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "private key"),
        ("password=hunter2", "password"),
        ("a,api_key: hunter2", "password"),
        ("it is " + "swordfish-77" + " here", "the value of MY_TOKEN"),
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_shown(value: str, what: str) -> None:
    with pytest.raises(ConfigError) as raised:
        refuse_key(
            "tracking.entity",
            value,
            {
                "MY_TOKEN": "swordfish-77",
                "WANDB_API_KEY": REVISION[::-1],
                "AWS_SECRET_ACCESS_KEY": "wJalr" + "a1B2/" * 7,
            },
        )
    assert "If " in str(raised.value)
    assert what in str(raised.value) and value not in str(raised.value) and "swordfish" not in str(raised.value)


@pytest.mark.parametrize(
    "value",
    [
        *("runs/first", "sweep/lr=0.1", "s3://bucket/imagenet", "train-{0000..1023}.tar", "tokenizer", "a" * 64, "key"),
        *(REVISION, f"models--timm/snapshots/{REVISION}", "sweep/max_token=128", "lr=0.1,token=64", "keyboard-us", ""),
        *("sweep/token=word", "/data/secret:garden", "a1B2/+Zx" * 5, "eyJ.eyJ.x", "mask-" + "abcd" * 6),
    ],
)
def test_what_is_no_secret_is_taken(value: str) -> None:
    """Also where a variable of another kind holds the same: `key` in its name makes no credential of it."""
    variables = (
        "HOME",
        "KEYBOARD_LAYOUT",
        "MONKEY",
        "TOKENIZERS_CACHE",
        "PWD",
        "OLDPWD",
        "SORT_KEY_FILE",
        "KEYTIMEOUT",
    )
    refuse_key(
        "name",
        value,
        {"SHORT_KEY": "key", "EMPTY_TOKEN": "", "SORT_KEY": "keyboard", **dict.fromkeys(variables, value)},
    )


def test_a_path_is_no_credential(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    refuse_key("run_root", f"{tmp_path}/token", {"WEB_TOKEN": f"{tmp_path}/token"})


@given(
    user=st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True),
    password=st.text("abcxyz019:/@?#%&=+!$", min_size=1, max_size=12).map(lambda text: f"S3cr3t{text}"),
    before=st.sampled_from(["", "cannot reach ", "Traceback\n  File 'x'\n"]),
    after=st.sampled_from(["", " (refused)", "\nnext line", "' and more"]),
)
def test_what_is_printed_holds_no_password(user: str, password: str, before: str, after: str) -> None:
    text = f"{before}https://{user}:{password}@host/path{after}"
    assert "S3cr3t" not in redacted(text)
    assert redacted(text).startswith(f"{before}https://***@") and redacted(text).endswith(after)
    assert redacted(f"{before}{after}") == f"{before}{after}"


@pytest.mark.not_quick
@pytest.mark.parametrize("argument", [f"name={KEY}", f"+tracking.api_key={REVISION}", f"wandb.token={REVISION}", KEY])
def test_a_key_in_an_argument_is_refused_before_anything_repeats_it(argument: str) -> None:
    ended = command(*BASE[1:], argument)
    assert ended.returncode == 2
    assert "must hold no secret" in ended.stderr and REVISION not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "override",
    [
        "name=${oc.env:WANDB_API_KEY}",
        "+x=${oc.env:WANDB_API_KEY}",
        "tracking.entity='${oc.env:WANDB_API_KEY}'",
        "model.metaparameters.a=${oc.env:HOME}",
    ],
)
def test_nothing_is_read_from_the_environment(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(ConfigError, match="reads the environment") as raised:
        compose("train", TrainConfig, [*BASE, override])
    assert KEY not in str(raised.value)


ATTACKS = {
    "hydra's callback": ("--cfg=job", "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x.command={marker}"),
    "hydra's launcher": ("--multirun", "hydra.launcher._target_=os.mkdir", "+hydra.launcher.path={marker}"),
    "a key of ours": ("model.metaparameters._target_=os.mkdir", "model.metaparameters.path={marker}"),
    "a group of ours": ("+model._target_=os.mkdir", "+model.path={marker}"),
}


@pytest.mark.not_quick
@pytest.mark.parametrize("arguments", ATTACKS.values(), ids=ATTACKS.keys())
def test_nothing_that_a_string_names_is_called(arguments: tuple[str, ...], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    ended = command(*BASE, *(argument.format(marker=marker) for argument in arguments))
    assert ended.returncode == 2 and "names something to call" in ended.stderr, ended.stderr
    assert not marker.exists()


FILES = {
    "an object of Python's": ("!!python/object/apply:os.mkdir ['{marker}']", "is no plain YAML"),
    "an object below a key": ("name: !!python/object/apply:os.mkdir ['{marker}']", "is no plain YAML"),
    "a call": ("recipe: {{_target_: os.mkdir, path: '{marker}'}}", "names something to call"),
    "a call of hydra's": ("hydra: {{callbacks: {{x: {{_target_: os.mkdir}}}}}}", "names something to call"),
    "the environment": ("name: ${{oc.env:WANDB_API_KEY}}", "reads the environment"),
}


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("text", "words", "flag"),
    [
        *((*file, "--config-dir={}") for file in FILES.values()),
        *((*FILES["a call"], flag) for flag in ("--config-dir {}", "-cd {}")),
    ],
)
def test_yaml_from_elsewhere_is_data(text: str, words: str, flag: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text("# @package _global_\n" + text.format(marker=marker))
    arguments = flag.format(tmp_path / "conf").split()
    ended = command(*arguments, "--cfg=job", *BASE, "experiment=evil", environment={"WANDB_API_KEY": KEY})
    assert ended.returncode == 2 and words in ended.stderr, ended.stderr
    assert not marker.exists() and KEY not in ended.stdout + ended.stderr


@pytest.mark.not_quick
def test_nothing_a_command_leaves_is_writable_by_everybody(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from pipeline.core.cli import run_command;"
        "from pipeline.config.training import TrainConfig; os.umask(0);"
        f"run_command('train', TrainConfig, lambda _: Path({str(tmp_path)!r}, 'left').write_text('') or 0)"
    )
    subprocess.run([sys.executable, "-c", program, *BASE], check=True, timeout=120)
    assert (tmp_path / "left").stat().st_mode & 0o777 == 0o664
