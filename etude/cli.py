"""From a frozen dataclass to a command line: flags, ``--config run.yaml``, ``--print_config`` and exit codes.

A thin layer over jsonargparse. A config is a dataclass whose fields are made by :func:`option`, so that the default
and the sentence that explains it stand beside the name; ``--help`` prints both.
"""

import dataclasses
import difflib
import errno
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from etude.errors import EtudeError, Interrupted, StorageError, UsageError

STORAGE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS,  # the disk
    errno.EACCES, errno.EPERM,  # permission
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,  # a path that cannot be what is asked of it
}  # fmt: skip
INTERRUPTED = "interrupted; nothing was left half-written"


def option(default: Any, help: str, **keywords) -> Any:
    """A dataclass field with its explanation. A callable ``default`` is called when the config is made."""
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help, **keywords})


def parse(config_class: type, description: str, argv: Sequence[str] | None = None, commands: dict[str, str] | None = None):
    """Read ``argv`` (the process's arguments by default) into a ``config_class``.

    ``commands`` maps the sub-commands to their explanations; the first is the default, and the return value is then
    ``(command, config)``. Exits with 0 after ``--help`` or ``--print_config``; raises :class:`UsageError`.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    if commands:
        explained = "; ".join(f"{name}: {text}" for name, text in commands.items())
        parser.add_argument("command", nargs="?", choices=list(commands), default=next(iter(commands)), help=explained)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML or JSON file of these options")
    for field in fields:
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kind, arity = hints[field.name], {}
        if kind == str | None:
            kind = str  # else a prompt such as "null" or "# A heading" would be read as YAML's null
        if kind is bool:  # a switch may be given bare (--deterministic) or with its value, as a config file gives it
            arity = {"nargs": "?", "const": True}
        elif get_origin(kind) is tuple:  # --data one.jsonl two.jsonl
            kind, arity, default = get_args(kind)[0], {"nargs": "+"}, list(default)
        parser.add_argument(
            f"--{field.name}",
            type=kind,
            default=default,
            help=field.metadata.get("help", ""),
            **arity,
        )
    arguments = list(sys.argv[1:] if argv is None else argv)
    _refuse_unknown_flags(arguments, [field.name for field in fields] + ["config", "print_config", "help"])
    try:
        values = parser.parse_args(arguments)
    except SystemExit:
        raise
    except Exception as error:  # argparse and jsonargparse raise several kinds for one thing: a bad command line
        raise UsageError(" ".join(str(error).split())) from error
    settings = {field.name: getattr(values, field.name) for field in fields}
    config = config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    return (values.command, config) if commands else config


def parse_commands(config_classes: dict[str, tuple[type | str, str]], description: str, argv: Sequence[str] | None = None):
    """Read ``argv`` where each sub-command has a config class of its own: ``{name: (config class, explanation)}``. The class
    may be named, "etude.corpus.survey.CheckConfig", and is then imported when its command is called.

    Returns ``(command, config)``; ``--help`` before a command lists them, after one its options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<12}{explanation}" for name, (_, explanation) in config_classes.items())
    usage = f"usage: {sys.argv[0].rpartition('/')[2]} COMMAND [options]   (COMMAND --help explains its options)\n\n{description}\n\n{listed}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else UsageError.exit_code)
    command = arguments[0]
    if command not in config_classes:
        near = difflib.get_close_matches(command, config_classes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(config_classes)}"
        raise UsageError(f"there is no command {command!r}; {hint}")
    config_class, explanation = config_classes[command]
    return command, parse(named_class(config_class), explanation, arguments[1:])


def named_class(config_class: type | str) -> type:
    """The class itself, or the one of this full name."""
    if isinstance(config_class, str):
        module, _, name = config_class.rpartition(".")
        return getattr(importlib.import_module(module), name)
    return config_class


def _refuse_unknown_flags(arguments: Sequence[str], names: Sequence[str]) -> None:
    for argument in arguments:
        flag = re.match(r"--([A-Za-z][\w-]*)", argument)
        if flag and flag[1] not in names:
            near = difflib.get_close_matches(flag[1].replace("-", "_"), names, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise UsageError(f"there is no option --{flag[1]}; {hint}")


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON and YAML values."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def save(config: Any, path: str) -> None:
    """Write a config as the YAML that ``--config`` takes back. What the config filled in by itself is told in a comment: beside
    another option it may be another.
    """
    import yaml

    values = as_dict(config)
    filled = {name: values[name] for name in getattr(config, "filled_in", ())}
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        if filled:
            file.write(f"# left out, and so: {', '.join(f'{name} {value}' for name, value in filled.items())}\n")
        yaml.safe_dump(values | dict.fromkeys(filled), file, sort_keys=False, allow_unicode=True)


def run(main: Callable[[], int | None]) -> None:
    """Call a script's ``main`` and leave the process with the exit code its outcome deserves."""
    # Windows consoles and pipes default to a legacy code page; every script prints Chinese and English.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":  # of several processes (torchrun) the first talks; errors are everybody's
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    _hear_what_python_ignores()
    try:
        sys.exit(main() or 0)
    except Interrupted as error:
        _leave(error)
    except EtudeError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt as error:
        if isinstance(error.__context__, Interrupted):  # one more Ctrl-C, on the way from there to here
            _leave(error.__context__)
        _interrupted()
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            _fail(
                f"{error.filename or 'the disk'}: {error.strerror}; free some space or choose another folder",
                StorageError.exit_code,
            )
        raise
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps what is raised in a __set_name__, as at imports
            _interrupted()
        raise


def _hear_what_python_ignores() -> None:
    """A Ctrl-C that comes while Python clears something away, as it does at imports, is only printed; let it come again."""
    told = sys.unraisablehook

    def hear(ignored) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.05, _interrupt)
            again.daemon = True
            again.start()
        else:
            told(ignored)

    sys.unraisablehook = hear


def _interrupt() -> None:
    if os.name == "posix":
        os.kill(os.getpid(), signal.SIGINT)  # wakes a main thread that waits
    else:
        signal.raise_signal(signal.SIGINT)  # os.kill would end the process on the spot


def _interrupted() -> None:
    _ignore("SIGINT")
    _fail(INTERRUPTED, 130)


def _leave(error: Interrupted) -> None:
    """End a run that was asked to stop. All is saved: asking again must not spoil the exit code that tells so."""
    _ignore("SIGINT", "SIGTERM", "SIGHUP")
    if os.environ.get("RANK", "0") != "0":  # all were asked, and the first tells
        sys.exit(error.exit_code)
    _fail(error, error.exit_code)


def _ignore(*names: str) -> None:
    for name in names:
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _fail(message: object, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
