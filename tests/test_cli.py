"""Command lines to configs."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

from etude import cli
from etude.errors import UsageError


@dataclass(frozen=True)
class Config:
    prompt: str | None = cli.option(None, "a text")
    steps: int | None = cli.option(None, "a number")
    data: tuple[str, ...] = cli.option((), "files")
    fast: bool = cli.option(False, "a switch, 50 % of the time")


@pytest.mark.parametrize("text", ["null", "~", "# A heading", "true", "12", "[a]", "a: b", "", "- x"])
def test_a_text_stays_the_text_it_is(text):
    """YAML would read some of these as nothing, a number or a list."""
    assert cli.parse(Config, "", ["--prompt", text]).prompt == text


def test_switches_numbers_and_lists():
    found = cli.parse(Config, "", ["--fast", "--steps", "3", "--data", "a", "b"])
    assert found == Config(prompt=None, steps=3, data=("a", "b"), fast=True)
    assert cli.parse(Config, "", ["--fast", "false"]) == Config()


def test_commands_have_a_default():
    commands = {"all": "everything", "some": "a part"}
    assert cli.parse(Config, "", [], commands) == ("all", Config())
    assert cli.parse(Config, "", ["some", "--steps", "1"], commands) == ("some", Config(steps=1))


@pytest.mark.parametrize("arguments", [["--step", "3"], ["--steps", "three"], ["--fast", "maybe"], ["stray"]])
def test_mistakes_are_one_line(arguments):
    with pytest.raises(UsageError) as caught:
        cli.parse(Config, "", arguments)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_read_back(tmp_path):
    config = Config(prompt="# 标题: x", steps=2, data=("a", "b"), fast=True)
    cli.save(config, str(tmp_path / "run.yaml"))
    assert cli.parse(Config, "", ["--config", str(tmp_path / "run.yaml")]) == config
    cli.save(Config(), str(tmp_path / "none.yaml"))
    assert cli.parse(Config, "", ["--config", str(tmp_path / "none.yaml")]) == Config()


def test_an_interruption_that_python_wrapped_is_one_still(capsys, monkeypatch):
    """Python 3.11 does where it comes while a class is made: in the middle of an import, say."""

    ignored = []
    monkeypatch.setattr(cli, "_ignore", lambda *names: ignored.extend(names))

    class Interrupted:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    def main():
        type("Imported", (), {"field": Interrupted()})

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == 130 and ignored == ["SIGINT"]  # one more would spoil the exit code
    assert capsys.readouterr().err == f"error: {cli.INTERRUPTED}\n"


def test_an_interruption_that_python_would_ignore_is_one_still():
    code = """if True:
        import time, weakref
        from etude import cli

        class Thing:
            pass

        def interrupted(reference):
            raise KeyboardInterrupt

        def main():
            thing = Thing()
            reference = weakref.ref(thing, interrupted)
            del thing
            time.sleep(30)

        cli.run(main)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"error: {cli.INTERRUPTED}\n")


def test_another_error_of_the_same_kind_is_shown_as_it_is():
    with pytest.raises(RuntimeError, match=r"^other$"):
        cli.run(lambda: (_ for _ in ()).throw(RuntimeError("other")))
