"""Write the built-in sample: a small bilingual world to pretrain on, converse about and be asked about."""

from dataclasses import dataclass

from etude import cli, paths
from etude.cli import option


@dataclass(frozen=True)
class SampleConfig:
    output: str = option(lambda: paths.training_data("").rstrip("/\\"), "folder to write pretrain/, sft/ and eval/ into")
    seed: int = option(0, "seed of the generator; the same seed writes the same bytes")


def main() -> None:
    config = cli.parse(SampleConfig, __doc__)
    from etude.corpus.sample.world import write_sample

    for name, count in write_sample(config.output, config.seed).items():
        print(f"{name:<12}{count:>8,} records")


if __name__ == "__main__":
    cli.run(main)
