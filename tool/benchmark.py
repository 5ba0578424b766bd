"""Measure Etude beside its peers, in one run: what takes turns on one machine can be compared."""

from etude import cli
from etude.benchmark.corpus import CorpusBenchmark, corpus
from etude.benchmark.data import DataBenchmark, data
from etude.benchmark.train import TrainBenchmark, train

COMMANDS = {
    "train": (TrainBenchmark, "tokens per second of whole training steps, beside Hugging Face's Llama"),
    "data": (DataBenchmark, "MB/s from text to token store, beside the tokenizers library; tokens/s of batches"),
    "corpus": (CorpusBenchmark, "MB/s and memory of the corpus tools, beside wikiextractor and raw JSON reading"),
}
RUN = {"train": train, "data": data, "corpus": corpus}


def main() -> None:
    command, config = cli.parse_commands(COMMANDS, __doc__)
    RUN[command](config)


if __name__ == "__main__":
    cli.run(main)
