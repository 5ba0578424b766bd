"""Print what the demo made, in one table."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from etude import cli, paths
from etude.cli import option
from etude.errors import MismatchError, VerificationError


@dataclass(frozen=True)
class SummaryConfig:
    started: int = option(0, "when the demo began, in seconds since 1970; 0: not known")
    require: float = option(0.0, "fail unless this share of all questions was answered exactly, and every reply ended")
    require_each: float = option(0.0, "fail unless this share was in every skill")


def read(path: Path) -> dict:
    if not path.is_file():
        raise MismatchError(f"{paths.typed(path)}: missing; run: make demo")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    config = cli.parse(SummaryConfig, __doc__)
    home = paths.workspace()
    chat, export = home / "weight" / "etude_sft_model", home / "weight" / "etude_sft_model_llama_format"
    text = read(home / "evaluation" / "text.json")["text"]
    questions = read(home / "evaluation" / "questions.json")["questions"]
    exported = read(export / "etude_export.json")
    rows = [("pretrained model", f"{text['bits_per_byte']:.3f} bits per byte on text it has not seen")]
    rows += [
        (f"  {skill}", f"{share:.1%} of unseen questions answered exactly") for skill, share in questions["by_skill"].items()
    ]
    rows += [
        (
            "all skills",
            f"{questions['exact_match']:.1%} exact; {questions['ended']:.1%} of the replies end with their end token",
        ),
        ("export", f"{exported['architecture']}, logits differ by at most {exported['max_logit_difference']:.1e}"),
        ("chat model", paths.typed(chat)),
        ("Llama format", paths.typed(export)),
        ("loss curves", f"{paths.typed(chat / 'loss.png')} and beside the pretrained model"),
    ]
    if config.started:
        rows.append(("time", f"{(time.time() - config.started) / 60:.1f} minutes"))
    print("\n" + "\n".join(f"{name:<18}{value}" for name, value in rows))
    least = min(questions["by_skill"].values())
    if questions["exact_match"] < config.require or least < config.require_each or (config.require and questions["ended"] < 1):
        raise VerificationError(
            f"{questions['exact_match']:.1%} exact, {least:.1%} in the weakest skill, {questions['ended']:.1%} ended; "
            f"required are {config.require:.0%}, {config.require_each:.0%} and, with --require, 100%"
        )
    print(f"\nTo chat with it:  python inference/hf.py --model {paths.typed(export)}")


if __name__ == "__main__":
    cli.run(main)
