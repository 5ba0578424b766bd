"""Cut text files of any size and encoding into JSONL documents at chapters, paragraphs and sentences, and normalise them.

python tool/split_text.py --input novels/ --output novels.jsonl --line_ends
"""

from etude import cli
from etude.corpus.texts.cutting import characters
from etude.corpus.texts.split_text import SplitTextConfig, split_text


def main() -> None:
    config = cli.parse(SplitTextConfig, __doc__)
    measure = characters
    if config.max_tokens:
        from etude.tokenizer import Tokenizer

        tokenizer = Tokenizer(config.tokenizer)

        def measure(texts):
            return [len(ids) for ids in tokenizer.encode_batch(texts)]

    split_text(config, measure)


if __name__ == "__main__":
    cli.run(main)
