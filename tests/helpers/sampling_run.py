"""Samples the embedded pipeline into a folder, as a script that a user starts in one or several processes."""

import sys

from trl_diffusion_pref.evaluation.sampling import sample, seeds_for
from trl_diffusion_pref.shapes import load_pipeline, prompts


PROMPTS = prompts()[:10]


def main(output: str, batch_size: int) -> None:
    samples = sample(
        load_pipeline(), PROMPTS, seeds_for(PROMPTS), batch_size=batch_size, output=output, num_inference_steps=8
    )
    print(f"made {samples.made}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
