"""Secrets are masked in whatever is written or printed, in many forms, and ordinary words stay."""

import io
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from cdm_lightning import export, sample
from cdm_lightning.config import job_folder, run_cli
from cdm_lightning.config.secrets import plain
from cdm_lightning.distributed import launch
from cdm_lightning.errors import UserError
from cdm_lightning.exporting.pipeline import model_card
from cdm_lightning.run.folder import Run
from cdm_lightning.terminal.output import MaskedStream, mask_output
from cdm_lightning.terminal.secrets import is_secret_key, masked, masked_command, masked_text

S = "Zq7XkP2mN9vB4tR8wL1c"  # what must not be seen
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FORMS = [
    *(
        f"hf_{S}{S[:14]}",
        f"hf_{LETTERS}",
        f"api_org_{S}",
        f"ghp_{S}{S[:16]}",
        f"gho_{S}",
        f"ghs_{S}",
        f"github_pat_11{S}_{S}",
    ),
    *(
        f"glpat-{S}",
        f"glrt-{S}",
        f"sk-{S}{S}",
        f"sk-proj-{S}_{S}",
        f"sk-ant-api03-{S}",
        f"sk-{LETTERS}",
        f"sk_live_{S}",
    ),
    *(
        f"xoxb-123456789012-{S}",
        f"xoxp-1-{S}",
        f"xapp-1-{S}",
        f"npm_{S}{S[:16]}",
        f"pypi-{S}{S}",
        f"SG.{S}.{S}",
        f"hvs.{S}",
    ),
    *(
        f"AKIA{S.upper()[:16]}",
        f"ASIA{S.upper()[:16]}",
        f"AIza{S}{S[:15]}",
        f"ya29.{S}",
        f"r8_{S}{S}",
        f"12345678:{S}{S[:15]}",
    ),
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{S}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n-----END RSA PRIVATE KEY-----",
    *(
        f"https://{S}@host.org/x",
        f"https://me:{S}@host.org/x",
        f"https://me:p@{S}@host/x",
        f"https://me:{S}/{S}@host/x",
    ),
    *(
        f"https://oauth2:{S}@gitlab.com/a.git",
        f"redis://:{S}@host:6379/0",
        f"me:{S}@db.host:5432",
        f"socks5://u:{S}@1.2.3.4:80",
    ),
    *(
        f"https://h/x?token={S}",
        f"https://h/x?a=1&access_token={S}&b=2",
        f"https://h/x?api_key={S}",
        f"https://h/x?key={S}",
    ),
    *(
        f"https://h/x?sig={S}",
        f"https://h/x?X-Amz-Signature={S}",
        f"https://h/x?X-Amz-Security-Token={S}",
        f"/#access_token={S}",
    ),
    *(f"Authorization: Bearer {S}", f"authorization: basic {S}==", f"Authorization: token {S}", f"X-Api-Key: {S}"),
    *(f"Bearer {S}", f"Cookie: {S}", f"--token {S}", f"--hub-token={S}", f"--password '{S} {S}'", f"-token {S}"),
    *(
        f"+hub_token={S}",
        f"['seed=1', '+hub_token={S}']",
        f"+auth={{user: me, value: {S}}}",
        f"+auth={{a: {{b: {S}}}}}",
    ),
    *(
        f"+auth=[{S},{S}]",
        f"backbone.token.value={S}",
        f"++x.credentials={S}",
        f"export HF_TOKEN={S}",
        f"DB_PASSWD={S}",
    ),
    *(
        f"MY_AUTH={S}",
        f"OPENAI_KEY={S}",
        f"AWS_SECRET_ACCESS_KEY={S}",
        f"MYSQL_PWD={S}",
        f"SOME_PASS={S}",
        f"apiKey={S}",
    ),
    *(f'"password": "{S}"', f"'hubToken': '{S}'", f"password: {S}", f"token: {S}", f'{{"a": {{"secret": "{S}"}}}}'),
    *(
        f"{{'x': {{'token': {{'value': '{S}'}}}}}}",
        f'password="a\\"{S}"',
        f"wandb_api_key={'0123456789abcdef' * 2}{S[:8]}",
    ),
    *(f"UserError: cannot log in (password={S})", f"AccountKey={S};EndpointSuffix=x", f"hftoken={S}", f"token={S}"),
]
WORDS = [
    *(
        "tokenizer=/models/t5/tokenizer_2",
        "max_tokens=512",
        "tokens: 77",
        "data.keyword=ring",
        "pad_token=<pad>",
        "num_tokens: 12345678",
    ),
    *(
        "text_tokens=1234567",
        "the key 'hidden' is not allowed",
        "unexpected keyword argument 'wieght'",
        "Key 'path' is not in struct",
    ),
    *(
        "full_key: data.train.path",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "https://huggingface.co/a/b?download=true",
    ),
    *(
        "ssh://git@github.com/a/b",
        "outputs/sk_run_of_mine_with_a_long_name",
        "hf_transfer_is_not_installed_here",
        "user@host",
    ),
    *(
        "val/clip_score/student_4",
        "learning_rate: 1e-4",
        "a cat at 12:30 with friends",
        "author=somebody_else",
        "key: value",
    ),
    *(
        "compact_text=8",
        "state.json: cannot be read",
        "module.schedule.length: at least 1 step",
        "image_key=photograph",
    ),
    *("token=null", "secret=true", "passes=12345678", "co_written_by_two_people_in_2024.txt", "monkey=bananas1"),
    *(
        "backbone.max_sequence_length=256",
        "process 4711 on host",
        "risk-averse-sk-long-words-are-here-okay",
        "a ratio of 3:4",
    ),
    *(
        "iteration_0000500",
        "toy2d-0123456789abcdef",
        "50 steps, guidance 1.5",
        "token_dropout=0.12345678",
        "http://host:8080/@user/x",
    ),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_masked_in_this_form(form):
    for text in (form, f"before {form} after", f"a\n{form}\nb"):
        found = masked_text(text)
        assert "***" in found
        assert not any(piece in found for piece in (S, S.upper()[:16], S[:8], LETTERS))
        assert masked_text(found) == found
    assert S not in str(masked_command([form]))


@pytest.mark.parametrize("text", WORDS)
def test_ordinary_words_stay(text):
    assert masked_text(text) == text
    assert masked_text(f"before {text} after") == f"before {text} after"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "token",
            "hub_token",
            "HF_TOKEN",
            "accessToken",
            "apiKey",
            "api_key",
            "API-KEY",
            "AWSSecretAccessKey",
            "client_secret",
        ),
        *(
            "password",
            "DB_PASSWD",
            "db_pass",
            "passphrase",
            "MY_AUTH",
            "auth",
            "Authorization",
            "bearer",
            "credentials",
        ),
        *(
            "hftoken",
            "wandb_key",
            "OPENAI_KEY",
            "private_key",
            "secret_id",
            "cookie",
            "MYSQL_PWD",
            "ssh_key",
            "GITHUB_PAT",
        ),
        *(
            "authToken",
            "x-api-key",
            "backbone.token.value",
            "TOKEN_2",
            "tokenForHub",
        ),
        *(
            "passkey",
            "otp",
            "seed_phrase",
            "session_id",
            "SSHPASS",
            "PGPASS",
            "KEYPASS",
            "DATABASE_URL",
            "SLACK_WEBHOOK",
        ),
        *(
            "SENTRY_DSN",
            "SSH_PRIVATE",
            "sessionId",
            "recovery_codes",
            "WEBHOOK_URL",
        ),
    ],
)
def test_keys_of_secrets(name):
    assert is_secret_key(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "tokenizer",
            "tokenizer_2",
            "max_tokens",
            "keyword",
            "tokens",
            "text_tokens",
            "num_tokens",
            "pad_token",
            "eos_token",
        ),
        *(
            "token_count",
            "token_ids",
            "keys",
            "key",
            "monkey",
            "image_key",
            "text_key",
            "author",
            "passes",
        ),
        *(
            "bypass",
            "compass",
            "path",
            "pattern",
            "max_sequence_length",
            "compact_text",
            "hidden",
            "keyboard",
            "secretary",
        ),
        *(
            "passenger",
            "SSH_AUTHOR",
            "special_tokens_map",
            "_target_",
            "fake_score",
            "monitor_key",
            "first_pass",
            "seed",
            "session",
            "url",
            "phrase",
            "private",
        ),
    ],
)
def test_keys_of_other_things(name):
    assert not is_secret_key(name)


def test_all_below_a_secret_key_is_masked():
    config = {
        "hub": {
            "token": {
                "value": "abc",
                "parts": ["a", {"b": "c"}],
                "tries": 3,
                "number": 123456,
                "is_set": True,
                "no": None,
            }
        },
        "credentials": [{"user": "me"}, "x"],
        "hub_tokens": [S],
        "backbone": {"tokenizer": "t5", "tokens": 77, "text_tokens": [1, 2], "text": f"see https://{S}@host"},
        f"hf_{LETTERS}": 1,
    }
    assert plain(OmegaConf.create(config)) == {
        "hub": {
            "token": {
                "value": "***",
                "parts": ["***", {"b": "***"}],
                "tries": 3,
                "number": "***",
                "is_set": True,
                "no": None,
            }
        },
        "credentials": [{"user": "***"}, "***"],
        "hub_tokens": ["***"],
        "backbone": {"tokenizer": "t5", "tokens": 77, "text_tokens": [1, 2], "text": "see https://***@host"},
        "***": 1,
    }
    assert masked(("a", {"password": ("b",)})) == ["a", {"password": ["***"]}]


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "DB_PASSWD", "MY_AUTH", "OPENAI_KEY", "X_SECRET", "MYSQL_PWD", "SOME_PASSWORD", "A_PASS"]
)
@pytest.mark.parametrize(
    "value", ["zebra-stripes", 'quo"te and\\slash', "пароль-é", "with space&sign=", "line one\nline two"]
)
def test_what_environment_variables_hold_is_masked_in_every_spelling(name, value, monkeypatch):
    from urllib.parse import quote

    monkeypatch.setenv(name, value)
    for text in (value, quote(value), quote(value, safe=""), json.dumps(value), repr([value])):
        assert "***" in masked_text(f"saw {text} here")
        for piece in ("zebra", "slash", "пароль", "sign", "line one"):
            assert piece not in masked_text(f"saw {text} here")


def test_environment_variables_mask_no_words_of_other_things(monkeypatch):
    for name, value in {
        "MY_KEY": "student",  # a short one is masked as a word only
        "SSH_AUTH_SOCK": "/tmp/agent.1",
        "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
        "USE_AUTH": "required",
        "A_TOKEN": "77",
    }.items():
        monkeypatch.setenv(name, value)
    text = "student_ema in /home/me/key.json, tokens 77, /tmp/agent.1 required"
    assert masked_text(text) == text
    assert masked_text("the student") == "the ***"


def test_commands_are_masked_by_the_argument_before_too():
    given = [
        "train",
        "--token",
        S,
        f"+auth={{a: {S}, b: c}}",
        "-m",
        "seed=1",
        f"--hub-token={S}",
        "x=token",
        "api_key=",
    ]
    shown = ["train", "--token", "***", "+auth=***", "-m", "seed=1", "--hub-token=***", "x=token", "api_key="]
    assert masked_command(given) == shown


X = "abcDEF0123456"  # too short for a shape
BEHIND_A_KEY = [
    *(
        f"error: hub_token='{X}'",
        f"error: +hub_token=[{X}]",
        f'x: a.hub_token="abc {X}"',
        f"ValueError: --password=[{X}]",
    ),
    *(
        f"a: b: c: hub_token={X}",
        f"error: x=y: hub_token={X}",
        f"a=b=hub_token={X}",
        f'job "+hub_token={{value: {X}}}"',
    ),
    *(f"hub_token:\n  value: {X}", f"hub_token: >\n  {X}", f"hub_token: |-\n  a\n\n  {X}", f"api_key:\n- a\n- {X}"),
    *(f"hub_token=b'{X}'", f"hub_token: b'{X}'", f"hub_token=[[{X}]]", f"hub_token={{a: {{b: {{c: {{d: [{X}]}}}}}}}}"),
    *(f"hub_token=abc{sign}{X}" for sign in ",;(|&#)]}<>'\"!:="),
    *(f"hub_token=({X})", f"hub_token=<{X}>", f"hub_token: ({X})", f"hub_token: <{X}>", f"hub_token=abc\\ {X}"),
    *(f"+hub.tokens=[a,{X}]", f"+hub={{tokens:[{X}]}}", f"+hub={{token:{X}}}", f"--password -{X}", f"+login=user:{X}"),
    *(f"['--token', '{X}']", f'{{\\"token\\": \\"{X}\\"}}', f'os.environ["HF_TOKEN"] = "{X}"', f"a;password='{X}'"),
    *(f"passphrase: correct horse {X}", f"a;Password={{{X}}};b=1", f"password='abc\nabc {X}'", f"hub_token => {X}"),
    *(f"token=${{oc.env:X,{X}}}", f"?token%5D={X}", f'Authorization: Digest username="u", response="{X}"'),
    *(f"Cookie: a=1; sid={X}", f"error: hub_token: value: {X}", f"error: bad hub_token:\n  value: {X}", f"otp={X}"),
    *(f"{{'auth': {{'a': 'b',\n 'c': \"x}}'{X}\"}}}}", f"Password:\n{X}", f"session_id={X}", f"seed_phrase: {X}"),
]


@pytest.mark.parametrize("text", BEHIND_A_KEY)
def test_the_whole_value_behind_a_secret_key_is_masked(text):
    for around in (text, f"a\n{text}\nseed: 5", f"{text} "):
        found = masked_text(around)
        assert "***" in found
        assert X not in found
        assert masked_text(found) == found
    assert X not in str(masked_command(["train", text]))
    assert masked_text(f"{text}\nseed: 5").endswith("\nseed: 5")


HEX = "0123456789abcdef" * 4
SHAPES = [
    *(
        f"hf_{LETTERS}{LETTERS[:8]}",
        f"ghp_{LETTERS}{LETTERS[:10]}",
        f"dapi{HEX[:32]}",
        f"SK{HEX[:32]}",
        f"glsa_{S}{S[:12]}_{HEX[:8]}",
    ),
    *(f"lsv2_pt_{HEX[:32]}_{HEX[:10]}", f"glc_eyJ{S}{S}", f"dp.st.dev.{S}{S}", f"dp.pt.{S}{S}abc", f"lin_oauth_{HEX}"),
    *(
        f"PMAK-{HEX[:24]}-{HEX[:34]}",
        f"{S[:14]}.atlasv1.{S}{S}{S}{S[:7]}",
        f"tskey-auth-{S[:12]}-{S}",
        f"ops_eyJ{S}{S}",
    ),
    *(f"tgp_v1_{S}{S}-_a", f"sk-or-v1-{HEX}", f"sk-{HEX[:32]}", f"https://hooks.slack.com/services/T0AB/B0CD/{S}"),
    *(f"https://discord.com/api/webhooks/123456/{S}", f"https://discordapp.com/api/v10/webhooks/1/{S}"),
]


@pytest.mark.parametrize("token", SHAPES)
def test_a_token_of_a_known_vendor_is_masked_without_a_key(token):
    for text in (token, f"saw {token} here", f"a/b ({token})."):
        found = masked_text(text)
        assert "***" in found
        assert not any(piece in found for piece in (S, S[:14], LETTERS, HEX[:8]))


HARMLESS = [
    *(
        "token_count=5",
        "max_tokens=4k",
        "tokens: [151643, 151645]",
        "tokens: ['north', 'east']",
        "text_tokens=[Hello12,b]",
    ),
    *(
        "hf_cache_2026_snapshot1234567890",
        "/data/co-flux-schnell-20240801",
        "/data/sk_stable-diffusion-3-medium20240801",
    ),
    *("stabilityai/stable-diffusion-3-medium-diffusers", "terminal/secrets.py:162-172", "config/secrets.py: E501 Line"),
    *(
        "tests/test_secrets.py::test_a[x]",
        "user: name",
        "user=1000:1000",
        "user: http://host:80/x",
        "bypass=Wide_Lane1",
    ),
    *(
        "first_pass=Somebody1",
        "a photo of a cat: highly detailed, 4K",
        "a cat, a password of the sea",
        "session: Morning12",
    ),
    *(
        "token=${oc.env:HF_TOKEN}",
        "pass_through=Abcdefg1",
        "private=Somebody1",
        "database=Postgres15",
        "the code: ABC12345",
    ),
    *("{'a': 1, 'seed': 12345678}", "webhooked=Somebody1", "seed: 12345678", "key(s) missing: decoder.Weight_1"),
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text):
    for around in (text, f"before {text} after", f"a\n{text}\nb"):
        assert masked_text(around) == around
    if "${" not in text:
        assert masked_command(["train", text]) == ["train", text]


def test_what_is_after_a_secret_stays():
    assert masked_text(f"a=1,hub_token={X},seed=1") == "a=1,hub_token=***,seed=1"
    assert masked_text(f"https://h/x?token={X}&b=2#c") == "https://h/x?token=***&b=2#c"
    assert masked_text(f'{{"token":"{X}","b":[1]}}') == '{"token":"***","b":[1]}'
    assert masked_text(f"cannot log in (token={X}): try again") == "cannot log in (token=***): try again"


def test_a_path_that_exists_is_no_secret_by_its_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"hf_{S}{S[:14]}"
    assert masked_text(f"backbone.pretrained={name}") == "backbone.pretrained=***"
    (tmp_path / name / "vae").mkdir(parents=True)
    for path in (name, f"{name}/vae", f"{tmp_path}/{name}", f"./{name}/"):
        assert masked_text(f"backbone.pretrained={path}") == f"backbone.pretrained={path}"
        assert plain(OmegaConf.create({"backbone": {"pretrained": path}}))["backbone"]["pretrained"] == path
        assert masked_text(f"the folder '{path}', which is here") == f"the folder '{path}', which is here"
    assert masked_text(f"hub_token={name}") == "hub_token=***"


def test_lists_of_tokens_and_logins_are_masked_in_commands_and_configurations():
    given = [
        "+hub.tokens=[abcDEF0123456,ghiJKL0123456]",
        "--password",
        f"-{X}",
        "-u",
        f"me:{X}",
        "--password",
        "-m",
        "x",
    ]
    assert masked_command(given) == ["+hub.tokens=***", "--password", "***", "-u", "***", "--password", "-m", "x"]
    assert masked({"login": f"me:{X}", "user": "me", "tokens": [X, 5]}) == {
        "login": "***",
        "user": "me",
        "tokens": ["***", 5],
    }


def test_many_keys_in_a_row_are_no_recursion():
    assert masked_text("a=" * 3000) == "a=" * 3000
    assert masked_text("a: " * 3000 + f"token={X}") == "a: " * 3000 + "token=***"
    assert masked_text("{a: " * 3000 + f"token={X}" + "}" * 3000) == "{a: " * 3000 + "token=***" + "}" * 3000


def test_masking_takes_no_long_time():
    """A text of a hundred kilobytes that fits the beginning of every pattern; a pattern that backtracks would take minutes."""
    for piece in (
        *("a=", "token=(", "token=(\n", "token: token: ", "user:", "user: user: ", "tokens=[", "token:\n", "token: {'"),
        *(
            "a-.",
            "token=<",
            "token=\\",
            "Cookie: a=b;",
            "secret.py:",
            "hf_abcDEF0123456abcDEF/",
            "token=a,b=",
            "x token:\n a\n",
        ),
        "eyJ",
        "://a:",
        'token="\\',
        "[{",
        "a:",
        "hf_a",
        "sk-a-",
        "--token ",
        "?token",
        "{token: {",
        "-----BEGIN PRIVATE KEY-----",
    ):
        text = piece * (100_000 // len(piece))
        assert len(masked_text(text)) <= len(text)


# ---- what is printed


@pytest.fixture
def begin(monkeypatch):
    """`begin()` is what reaches the terminal from then on; pytest replaces both streams between a fixture and its test."""

    def begun() -> io.StringIO:
        screen = io.StringIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, screen)
        return screen

    return begun


def test_everything_that_a_process_prints_is_masked(begin):
    screen = begin()
    logger, root = logging.getLogger("a library"), logging.StreamHandler()
    logger.addHandler(root)
    mask_output()
    mask_output()
    assert isinstance(sys.stderr, MaskedStream)
    assert sys.stderr.stream is screen
    try:
        raise RuntimeError(f"password={S}")
    except RuntimeError:
        traceback.print_exc()
    logger.warning("token=%s", S)
    print(f"https://{S}@host", S[:3])
    print("and", f"hf_{S}", file=sys.stderr)
    sys.stdout.writelines([f"api_key={S}\n"])
    logger.removeHandler(root)
    shown = screen.getvalue()
    assert S not in shown
    assert shown.count("***") == 6  # the traceback shows the line of the program too
    assert "RuntimeError: password=***" in shown
    assert sys.stderr.isatty() is False


def test_a_line_that_is_printed_in_pieces_is_masked_as_a_whole():
    screen = io.StringIO()
    stream = MaskedStream(screen)
    print("token:", X, file=stream)
    assert screen.getvalue() == "token: ***\n"
    for piece in (
        "at 50% hub_",
        "token=abc",
        "DEF0123",
        "456 and",
        " more",
    ):  # each reaches the terminal, as a bar does
        print(piece, end="", file=stream, flush=True)
    assert screen.getvalue() == "token: ***\nat 50% hub_token=*** and more"
    print("\r60%", end="", file=stream, flush=True)
    print(file=stream)
    assert screen.getvalue().endswith(" more\r60%\n")
    stream.write("no end")
    assert stream.write("x" * 20_000) == 20_000
    assert len(screen.getvalue()) > 20_000
    stream.write(" a")
    stream.flush()
    assert screen.getvalue().endswith("x a")


@pytest.mark.parametrize("line", ["/data/run: token=%s\n", "/ hub_token=%s/x\n", "//host/a b\n", "/\n"])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_lines_with_slashes_are_printed_in_pieces_as_whole(line, size):
    """However a line is cut into writes, and whether each write is shown at once, no secret and no other text is printed."""
    said = line.replace("%s", X)
    whole = io.StringIO()
    MaskedStream(whole).write(said)
    for is_shown in (False, True):
        screen = io.StringIO()
        stream = MaskedStream(screen)
        for begin in range(0, len(said), size):
            print(said[begin : begin + size], end="", file=stream, flush=is_shown)
        assert X not in screen.getvalue()
        if not is_shown:
            assert screen.getvalue() == whole.getvalue()
    if "%s" not in line:
        assert screen.getvalue() == whole.getvalue() == said


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["experiment=toy2d_cdm", "hydra.output_subdir=.hydra"]),
        ("train", ["-m", "experiment=toy2d_cdm", "seed=1,2", "hydra.output_subdir=../../x"]),
        ("pretrain", ["hydra.output_subdir=x"]),
    ],
)
def test_hydra_s_own_copies_of_the_configuration_are_refused(name, arguments, begin, tmp_path, monkeypatch):
    screen = begin()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments, f"+hub_token={S}"])
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda config: pytest.fail("the task began"), name)
    assert stop.value.code == 2
    assert screen.getvalue().startswith("error: hydra.output_subdir=")
    assert screen.getvalue().count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "argument",
    [
        "password='%s",
        'api_key="%s',
        "+hub_token=[%s",
        "hub_token=%s,other",
        "+a.token={b: %s",
        "token=%s#ü",
        "~api_key='%s",
    ],
)
def test_an_argument_that_cannot_be_read_is_masked(argument, begin, tmp_path, monkeypatch):
    """The message shows the argument twice: as it is, and as it should be quoted."""
    screen = begin()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "experiment=toy2d_cdm", argument % S])
    with pytest.raises(SystemExit):
        run_cli(lambda config: pytest.fail("the task began"), "train")
    assert screen.getvalue().startswith("error: ")
    assert S not in screen.getvalue()


@pytest.mark.parametrize("error", [RuntimeError, UserError, KeyError, ValueError])
def test_hydra_s_own_lines_are_masked(error, begin, monkeypatch, tmp_path):
    screen = begin()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train", "experiment=toy2d_cdm", f"+hub_token={S}", f"+auth={{user: me, value: {S}}}"]
    )

    def task(config) -> None:
        assert sys.argv[2] == "+hub_token=***"  # a logger would write it down
        raise error(f"cannot use {config.hub_token} with hub_token={config.hub_token}".replace(f"use {S}", "it"))

    with pytest.raises((SystemExit, error)):
        run_cli(task, "train")
    shown = screen.getvalue()
    assert S not in shown
    assert "hub_token=***" in shown


def test_the_other_commands_mask_too(begin, tmp_path, monkeypatch):
    screen = begin()
    secret = f"hf_{S}"
    monkeypatch.chdir(tmp_path)
    for main, arguments in (
        (export.main, [f"/no/{secret}", "--output", "x"]),
        (sample.main, ["--model", "m", "--prompt", "p", "--prompts-file", f"/no/{secret}", "--output", "x"]),
        (sample.main, ["--model", f"https://{S}@host/m", "--prompt", "p"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert S not in screen.getvalue()
    assert screen.getvalue().count("error: ") == 3


# ---- what is written


def test_a_sweep_s_folders_and_file_hold_no_secret(begin, tmp_path, monkeypatch):
    screen = begin()
    monkeypatch.chdir(tmp_path)
    words = ["experiment=toy2d_cdm", "run_name=x", f"+hub_token={S}", f"+auth={{a: {{b: {S}}}}}", "seed=1,2"]
    monkeypatch.setattr(sys, "argv", ["train", "-m", *words])
    seen = []
    run_cli(lambda config: seen.append((config.seed, config.hub_token, Path(config.output_dir).name)), "train")
    assert [job[:2] for job in seen] == [(1, S), (2, S)]
    assert len({job[2] for job in seen}) == 2
    everything = [
        *(str(path) for path in tmp_path.rglob("*")),
        *(path.read_text() for path in tmp_path.rglob("*.yaml")),
    ]
    assert S not in str(everything) + screen.getvalue()
    sweep = yaml.safe_load((tmp_path / "outputs/x/multirun/multirun.yaml").read_text())
    assert sweep["hub_token"] == "***"
    assert sweep["auth"] == {"a": {"b": "***"}}


def test_the_jobs_of_a_sweep_have_folders_of_their_own():
    names = {job_folder(f"a=1,hub_token={S}{number}") for number in range(20)}
    assert len(names) == 20
    assert all(name.startswith("a=1,hub_token=.-") and S not in name for name in names)
    assert job_folder("seed=1,max_tokens=77") == "seed=1,max_tokens=77"


def test_a_launcher_that_is_killed_leaves_no_secret(tmp_path, monkeypatch):
    """Neither while the processes run is there one in its folder, which a kill would leave."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(launch.tempfile, "tempdir", None)
    text = f"hub_token: {S}\nseed: 1\n"

    def looked(folder: Path, processes: int) -> int:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files
        assert all(S not in path.read_text() for path in files)
        order = json.loads((folder / launch.COMMAND).read_text())
        assert order["command"] == ["train", "+hub_token=***"]
        program = "import sys; print(open(sys.argv[1]).read(), end='')"
        read = [
            subprocess.run([sys.executable, "-c", program, order["config"]], capture_output=True, text=True).stdout
            for _ in range(processes)
        ]
        assert read == [text] * processes
        return 0

    monkeypatch.setattr(launch, "run_processes", looked)
    assert launch.launch(text, 2, "a:b", ["train", f"+hub_token={S}"]) == 0
    monkeypatch.setattr(launch.tempfile, "tempdir", None)


def test_a_model_card_holds_no_secret(tmp_path):
    objective = {"_target_": "a.B", "hub_token": S, "address": f"https://{S}@host/x"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"backbone": {"_target_": "x"}, "objective": objective}))
    card = model_card("student", {"nfe": 4, "weights": "student", "iteration": 1, "dtype": "float32"}, Run(tmp_path))
    assert S not in card
    assert "hub_token: '***'" in card


def test_the_run_s_own_files_and_logs_hold_no_secret(toy_run, monkeypatch):
    monkeypatch.setenv("DB_PASSWD", f"env-{S}")
    monkeypatch.setattr(sys, "argv", ["train", f"+hub_token={S}"])
    made = toy_run(
        *("trainer.max_steps=1", "logger=[csv,tensorboard]", f"+hub_token={S}", f"+text=env-{S}"),
        f"+mirror='https://{S}@host/x?token={S}'",
    )
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".yaml", ".jsonl", ".csv", ".json", ".pt", ".safetensors"}
    assert [path for path in files if S.encode() in path.read_bytes()] == []
    assert os.environ["DB_PASSWD"] == f"env-{S}"
