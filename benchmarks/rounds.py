"""What one, two and three rounds of self-made pairs do to the embedded pipeline, and how long each takes.

    python benchmarks/rounds.py

Written to results/rounds.md.
"""

import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import rounds_shapes  # noqa: E402


ROUNDS = 3


def main() -> None:
    lines = [
        "# Rounds of self-made pairs",
        "",
        "Written by `benchmarks/rounds.py`: `examples/rounds_shapes.py` with three rounds, 18 prompts of 14 samples "
        "and 40 MaPO steps in each. Shares of 64 images from the same seeds.",
        "",
        "| | outlined | colour | shape | clean within style |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for number, one in enumerate(rounds_shapes.main(["--output_dir", folder, "--rounds", str(ROUNDS)])):
            shares = (one.preferred, one.colour, one.shape, one.clean_in_style)
            name = f"after round {number}" if number else "base"
            lines.append(f"| {name} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
        minutes = (time.perf_counter() - began) / 60
    lines += ["", f"All of it took {minutes:.1f} minutes on two CPU cores."]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "rounds.md").write_text(text)


if __name__ == "__main__":
    main()
