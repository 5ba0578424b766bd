"""Say what is wrong with data, a tokenizer, a model or a run, what it means and what to do:
`python tool/doctor.py weight/etude_sft_model`, `python tool/doctor.py my_chats.jsonl --tokenizer weight/tokenizer`.
"""

import sys

from etude import cli
from etude.doctor.config import DoctorConfig


def main() -> int:
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--input")
    config = cli.parse(DoctorConfig, __doc__, arguments)
    from etude.doctor.examine import examine

    report = examine(config)
    print(report.summary())
    return report.exit_code


if __name__ == "__main__":
    cli.run(main)
