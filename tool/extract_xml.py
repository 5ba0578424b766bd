"""Extract the plain text of articles from a Wikipedia dump (or any MediaWiki export), as JSONL for pretraining.

python tool/extract_xml.py --input zhwiki-latest-pages-articles-multistream.xml.bz2 --output zhwiki.jsonl
"""

from etude import cli
from etude.corpus.wiki.extract import ExtractConfig, extract


def main() -> None:
    extract(cli.parse(ExtractConfig, __doc__))


if __name__ == "__main__":
    cli.run(main)
