"""What the doctor found: one line a check, the worst of them the exit code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from etude.errors import EtudeError, VerificationError

OK, WARN, BAD, NOT_LOOKED = "ok", "warn", "BAD", "--"


class Finding(NamedTuple):
    level: str  # OK, WARN, BAD or NOT_LOOKED
    check: str  # what was looked at
    said: str  # what there is; if something is wrong, also what it means and what to do


class Report:
    """Findings in the order in which they are made, each told at once: a long look shows what it has so far."""

    def __init__(self, tell: Callable[[str], None] = print):
        self.findings: list[Finding] = []
        self._tell = tell

    def heading(self, text: str) -> None:
        self._tell(_one_line(text))

    def ok(self, check: str, said: str) -> None:
        self._add(OK, check, said)

    def warn(self, check: str, said: str) -> None:
        """Something that may be meant, but often is not."""
        self._add(WARN, check, said)

    def bad(self, check: str, said: str) -> None:
        """Something that makes a run or a model wrong."""
        self._add(BAD, check, said)

    def not_looked(self, check: str, said: str) -> None:
        """What the doctor could not judge, and why: silence would pass for health."""
        self._add(NOT_LOOKED, check, said)

    def _add(self, level: str, check: str, said: str) -> None:
        finding = Finding(level, _one_line(check), _one_line(said))
        self.findings.append(finding)
        self._tell(f"{level:<6}{finding.check}: {finding.said}")

    @contextmanager
    def examining(self, check: str) -> Iterator[None]:
        """Whatever is raised inside becomes an alarm. Damaged files and hostile ones raise every kind of exception, in every
        library that reads them, and one of them must not hide what the others have.
        """
        try:
            yield
        except EtudeError as error:
            self.bad(check, str(error))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            self.bad(
                check, f"cannot be made sense of ({reason}); it is damaged, or not what its name says: restore or remake it"
            )

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def summary(self) -> str:
        def some(level: str, one: str, many: str) -> str:
            count = self.count(level)
            return f"{count} {one if count == 1 else many}"

        return ", ".join(
            (
                some(BAD, "alarm", "alarms"),
                some(WARN, "warning", "warnings"),
                some(OK, "check in order", "checks in order"),
                f"{self.count(NOT_LOOKED)} not looked at",
            )
        )

    @property
    def exit_code(self) -> int:
        return VerificationError.exit_code if self.count(BAD) else 0


def some_of(things: list[str], shown: int = 3) -> str:
    """The first few of a list, in words."""
    more = f" and {len(things) - shown:,} more" if len(things) > shown else ""
    return "; ".join(things[:shown]) + more


def _one_line(text: str) -> str:
    """File names and data are others' words: no line breaks, and nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
