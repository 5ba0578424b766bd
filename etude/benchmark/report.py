"""How a benchmark tells its figures."""

import json

from etude.files import whole_file


def tell(figures: dict[str, object], output: str) -> None:
    """Print a figure a line, and write them to a .json file if one is named."""
    for name, figure in figures.items():
        print(f"{name:<28}{figure}")
    if output:
        with whole_file(output) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
