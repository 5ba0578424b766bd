"""Measure a model: loss, perplexity and bits per byte on text or conversations; exact match on questions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etude import cli, paths
from etude.cli import option
from etude.errors import UsageError
from etude.files import whole_file


@dataclass(frozen=True)
class EvaluateConfig:
    model: str = option(lambda: paths.weight("etude_sft_model"), "model folder: Etude's or a Llama")
    text: tuple[str, ...] = option((), "text to measure the loss on: .jsonl or .txt files, folders, globs")
    conversations: tuple[str, ...] = option((), "conversations to measure the loss of the replies on: .jsonl files")
    questions: tuple[str, ...] = option((), "conversations that end with the expected answer, to measure exact match on")
    output: str = option("", "also write the results, every answer included, to this .json file")
    show_wrong: int = option(5, "wrong answers to print")
    batch_size: int = option(16, "sequences at a time; the results do not depend on it")
    block_size: int = option(0, "tokens of context (0: the model's, but at most 2,048)")
    text_key: str = option("text", "key of the text in .jsonl records")
    text_unit: Literal["line", "file"] = option("line", "what one document is in .txt files")
    token_cache: str = option(lambda: paths.training_data("tokenized"), "folder that keeps data once tokenised")
    max_bad: int = option(0, "bad records to skip and list before giving up")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["fp32", "bf16"] = option("fp32", "bf16 is faster on hardware that multiplies it, and less exact")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.block_size < 0 or self.max_bad < 0:
            raise UsageError("batch_size must be at least 1, block_size and max_bad at least 0")


def main() -> None:
    config = cli.parse(EvaluateConfig, __doc__)
    if not (config.text or config.conversations or config.questions):
        raise UsageError("nothing to measure; name some --text, --conversations or --questions")
    require_no_other_file(config.output)
    from etude.data.pretrain import PretrainBlocks, prepare_pretrain
    from etude.data.sft import SFTRows, prepare_sft
    from etude.evaluation import ask, evaluate_loss, read_questions
    from etude.generation.text import load

    model = load(config.model, config.device, "fp32", verify=True)
    tokenizer, device = model.tokenizer, model.model.head_weight.device
    block_size = config.block_size or min(model.context, 2_048)
    if block_size > model.context:
        raise UsageError(f"block_size ({block_size}) is longer than the model's context ({model.context})")
    keep = {"cache": config.token_cache, "val_fraction": 0.0, "max_bad": config.max_bad}
    results: dict[str, object] = {"model": config.model}

    def measure(name: str, samples) -> None:
        found = evaluate_loss(model.model, samples, device, config.precision, batch_size=config.batch_size)
        bits = found.bits_per_byte(samples.store.text_bytes)
        results[name] = {"loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": bits, "tokens": found.tokens}
        print(
            f"{name:<14}loss {found.loss:.4f}  perplexity {found.perplexity:.2f}  bits/byte {bits:.4f}  ({found.tokens:,} tokens)"
        )

    if config.text:
        store, _ = prepare_pretrain(
            config.text, tokenizer, text_key=config.text_key, text_unit=config.text_unit, workers=0, **keep
        )
        measure("text", PretrainBlocks(store, block_size, tokenizer.pad_id))
    if config.conversations:
        store, _ = prepare_sft(config.conversations, tokenizer, block_size=block_size, **keep)
        measure("conversations", SFTRows(store, block_size, tokenizer.pad_id))
    if config.questions:
        found = ask(model, read_questions(config.questions, config.max_bad), config.batch_size)
        answers = [{**vars(answer), "correct": answer.correct} for answer in found.answers]
        results["questions"] = {
            "exact_match": found.overall,
            "ended": found.ended,
            "by_skill": found.by_skill,
            "answers": answers,
        }
        for skill, share in {**found.by_skill, "all": found.overall}.items():
            print(f"{skill:<14}{share:6.1%} exact")
        print(f"{'ended':<14}{found.ended:6.1%} of the replies closed with their end token")
        for answer in [answer for answer in found.answers if not answer.correct][: config.show_wrong]:
            print(f"  wrong ({answer.skill}): {answer.question!r} → {answer.given!r}, expected {answer.expected!r}")
    if config.output:
        with whole_file(config.output) as path:
            path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written       {paths.typed(Path(config.output))}")


def require_no_other_file(output: str) -> None:
    """Raise :class:`UsageError` if results written to ``output`` would replace anything but earlier results."""
    path = Path(output)
    if not output or (path.suffix == ".json" and not path.exists()):
        return
    try:
        earlier = path.suffix == ".json" and "model" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        earlier = False
    if not earlier:
        raise UsageError(
            f"{output}: not a name ending in .json, or a file that holds no results of this tool; choose another --output"
        )


if __name__ == "__main__":
    cli.run(main)
