"""A template's name and arguments, as the text between ``{{`` and ``}}`` gives them."""

from dataclasses import dataclass


@dataclass
class Call:
    """One use of a template: its casefolded name, its arguments, and what it must know of the page."""

    name: str
    positional: list[str]
    named: dict[str, str]
    title: str  # of the page
    language: str  # of the page, as far as it can be told: "zh", "en" or ""
    variant: str  # of Chinese

    def at(self, *positions: int) -> str:
        """The first of the positional arguments, counted from 1, that is there and not blank; else ""."""
        for position in positions:
            if position <= len(self.positional) and (value := self.positional[position - 1].strip()):
                return value
        return ""

    def get(self, *names: str) -> str:
        """The first of the named arguments that is there and not blank; else ""."""
        for name in names:
            if value := self.named.get(name, "").strip():
                return value
        return ""


def parse_call(body: str, title: str, language: str, variant: str) -> Call:
    """Read ``name|positional|key=value``. ``1=`` and so on are positional, as in MediaWiki."""
    name, *arguments = body.split("|")
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            positional.append(argument)
        elif (key := key.strip()).isdecimal() and 0 < int(key[:3]) < 100:
            while len(positional) < int(key[:3]):
                positional.append("")
            positional[int(key[:3]) - 1] = value
        else:
            named[key.casefold()] = value
    return Call(template_name(name), positional, named, title, language, variant)


def template_name(name: str) -> str:
    """The name as the tables have it. ``{{Template:Foo_bar}}`` is ``foo bar``."""
    name = name.strip().replace("_", " ").casefold()
    return name[9:].strip() if name.startswith("template:") else name
