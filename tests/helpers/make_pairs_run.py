"""Makes pairs of the embedded pipeline's samples, as a script that a user starts in one or several processes."""

import sys

from trl_diffusion_pref import make_pairs
from trl_diffusion_pref.shapes import load_pipeline, prompts, shapes_reward


def main(output: str, batch_size: int) -> list[tuple]:
    pairs = make_pairs(
        {"base": load_pipeline()},
        prompts()[:5],
        shapes_reward,
        output,
        samples_per_prompt=2,
        strategy="all",
        batch_size=batch_size,
        num_inference_steps=6,
    )
    return [(row["prompt"], row["chosen"].tobytes(), row["rejected_seed"], row["chosen_score"]) for row in pairs]


if __name__ == "__main__":
    print(f"rows {len(main(sys.argv[1], int(sys.argv[2])))}")
