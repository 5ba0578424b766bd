"""Measure Etude beside its peers, in one run: what takes turns on one machine can be compared."""

from etude import cli
from etude.benchmark.corpus import CorpusBenchmark, corpus
from etude.benchmark.data import DataBenchmark, data
from etude.benchmark.decode import DecodeBenchmark, decode
from etude.benchmark.sft import SFTBenchmark, sft
from etude.benchmark.speedrun import SpeedrunBenchmark, speedrun
from etude.benchmark.train import TrainBenchmark, train

COMMANDS = {
    "train": (TrainBenchmark, "tokens per second of whole training steps, beside Hugging Face's Llama"),
    "sft": (SFTBenchmark, "useful tokens per second of fine-tuning steps, packed and padded, beside Hugging Face's Llama"),
    "speedrun": (SpeedrunBenchmark, "bits per byte of a model trained from scratch for a fixed time"),
    "data": (DataBenchmark, "MB/s from text to token store, beside the tokenizers library; tokens/s of batches"),
    "decode": (DecodeBenchmark, "tokens per second of generation, beside Hugging Face's generate and the memory's bandwidth"),
    "corpus": (CorpusBenchmark, "MB/s and memory of the corpus tools, beside wikiextractor and raw JSON reading"),
}
RUN = {"train": train, "sft": sft, "speedrun": speedrun, "data": data, "decode": decode, "corpus": corpus}


def main() -> None:
    command, config = cli.parse_commands(COMMANDS, __doc__)
    RUN[command](config)


if __name__ == "__main__":
    cli.run(main)
