"""Download training data: resumed where it was interrupted, checked, whole or not at all."""

from etude import cli
from etude.corpus.fetch.download import WikipediaConfig, download_wikipedia
from etude.corpus.fetch.hub import FileConfig, MiniMindConfig, download_file, download_minimind

COMMANDS = {
    "minimind": (MiniMindConfig, "MiniMind's pretraining text and conversations"),
    "wikipedia": (WikipediaConfig, "a Wikipedia's dump, for tool/extract_xml.py"),
    "file": (FileConfig, "files of any dataset on the Hugging Face Hub or ModelScope"),
}
RUN = {"minimind": download_minimind, "wikipedia": download_wikipedia, "file": download_file}


def main() -> None:
    command, config = cli.parse_commands(COMMANDS, __doc__)
    RUN[command](config)


if __name__ == "__main__":
    cli.run(main)
