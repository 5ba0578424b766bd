"""Train the tokenizer: `python train_tokenizer.py all`, or one of its steps `config`, `train`, `verify`."""

from etude import cli
from etude.training.config import TokenizerConfig

COMMANDS = {
    "all": "config, train and verify",
    "config": "show and check what would be used",
    "train": "learn the vocabulary",
    "verify": "prove that the tokenizer is sound, and print its compression",
}


def main() -> None:
    command, config = cli.parse(TokenizerConfig, __doc__, commands=COMMANDS)
    from etude.training import tokenizer as stage

    if command in ("all", "config", "train"):
        stage.show_config(config)
    if command in ("all", "train"):
        stage.train(config)
    if command in ("all", "verify"):
        stage.verify(config)


if __name__ == "__main__":
    cli.run(main)
