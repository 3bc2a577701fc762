"""Does a comparison find something where there is nothing? The base against itself with other seeds, 20 times.

    python benchmarks/comparison_of_equals.py

Samples of the embedded pipeline are divided into 40 sets of two per prompt, and each set is compared with the next one
as if it came from another model. Written to results/comparison_of_equals.md.
"""

from pathlib import Path

import numpy as np

from trl_diffusion_pref.evaluation import Comparison
from trl_diffusion_pref.shapes import load_pipeline, prompts, sample, shapes_reward


RESULTS = Path(__file__).parent / "results"
REPETITIONS, SAMPLES = 20, 2


def main() -> None:
    asked, sets = prompts(), 2 * REPETITIONS
    repeated = [prompt for prompt in asked for _ in range(sets * SAMPLES)]
    scores = np.array(shapes_reward(repeated, sample(load_pipeline(), repeated, seed=11)))
    # (prompts, sets, samples)
    scores = scores.reshape(len(asked), sets, SAMPLES)
    seeds = [[0] * SAMPLES] * len(asked)
    contained, rates = 0, []
    for number in range(0, sets, 2):
        both = {"base": {"score": scores[:, number]}, "other seeds": {"score": scores[:, number + 1]}}
        found = Comparison(list(both), asked, seeds, "image", both).win_rate("other seeds", "score")
        assert found is not None
        contained += found.low <= 0.5 <= found.high
        rates.append(found.value)
    text = (
        "# The base against itself, with other seeds\n\n"
        f"Written by `benchmarks/comparison_of_equals.py`: {len(asked)} prompts, {SAMPLES} samples each, the judge's "
        f"scores. The 95 % interval of the win rate contains one half in {contained} of {REPETITIONS} comparisons. "
        f"Win rates are {min(rates):.0%} to {max(rates):.0%}, {np.mean(rates):.1%} on average.\n"
    )
    print(text)
    (RESULTS / "comparison_of_equals.md").write_text(text)


if __name__ == "__main__":
    main()
