"""Export a model in Hugging Face's Llama format, and prove that transformers computes the same with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etude import cli, paths
from etude.cli import option
from etude.errors import MismatchError

DEFAULT_INPUT = paths.weight("etude_sft_model")


@dataclass(frozen=True)
class ConvertConfig:
    input: str = option(DEFAULT_INPUT, "folder of the Etude model")
    output: str | None = option(None, "folder to write; left out: the input's name and _llama_format")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the stored weights")
    license: str = option("unknown", "the model card's licence, as Hugging Face abbreviates it: apache-2.0, cc-by-sa-4.0, ...")


def main() -> None:
    config = cli.parse(ConvertConfig, __doc__)
    source = Path(config.input)
    output = Path(config.output) if config.output else source.resolve().with_name(f"{source.resolve().name}_llama_format")
    if not (source / "config.json").is_file():
        remedy = "run: python train/train_sft.py" if config.input == DEFAULT_INPUT else "name an Etude model with --input"
        raise MismatchError(f"{paths.typed(source)}: there is no model here; {remedy}")
    from etude.export import export_llama

    report = export_llama(source, output, dtype=config.dtype, license=config.license)
    print(f"model         {report.architecture}, {report.parameters:,} parameters, {report.dtype}")
    print(f"logits        largest difference {report.max_logit_difference:.1e} at {report.positions} positions, in fp32")
    print(f"greedy        {report.greedy_tokens} tokens, all identical")
    if report.dtype != "float32":
        print(f"{report.dtype:<14}changes a logit by up to {report.dtype_difference:.1e}")
    print(f"licence       {config.license}" + (" (name one with --license)" if config.license == "unknown" else ""))
    print(f"written       {paths.typed(output)}")


if __name__ == "__main__":
    cli.run(main)
