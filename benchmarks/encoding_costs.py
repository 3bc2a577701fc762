"""What encoding takes for published models: disk, memory and operations, for a pair, a prompt, and Pick-a-Pic v2.

    python benchmarks/encoding_costs.py

Computed from the models' sizes by `trl_diffusion_pref.data.costs`; nothing is downloaded or encoded. Written to
results/encoding_costs.md.
"""

from pathlib import Path

from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.data.cache import readable_bytes
from trl_diffusion_pref.data.costs import encoding_costs
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.published_sizes import PUBLISHED, published_pipeline


RESULTS = Path(__file__).parent / "results"
# Pick-a-Pic v2, train split.
ROWS, PROMPTS = 851_293, 58_960


def tera(flops: int) -> str:
    return f"{flops / 1e12:.3g}"


def main() -> None:
    each = [
        '| model | a pair | with `latent_sampling="mean"` | a prompt | VAE, TFLOP a pair | text, TFLOP a prompt |',
        "|---|---|---|---|---|---|",
    ]
    whole = [
        '| model | disk | with `latent_sampling="mean"` | of it prompts | memory while training | operations, EFLOP |',
        "|---|---|---|---|---|---|",
    ]
    for name in PUBLISHED:
        pipeline = published_pipeline(name)
        family = family_for(pipeline)
        costs = encoding_costs(pipeline, family, EncodingOptions())
        mean = encoding_costs(pipeline, family, EncodingOptions(keep_std=False))
        total, total_mean = costs.of(ROWS, PROMPTS), mean.of(ROWS, PROMPTS)
        each.append(
            f"| {name} | {readable_bytes(costs.row_bytes)} | {readable_bytes(mean.row_bytes)} | "
            f"{readable_bytes(costs.prompt_bytes)} | {tera(costs.sample_flops)} | {tera(costs.prompt_flops)} |"
        )
        whole.append(
            f"| {name} | {readable_bytes(total.row_bytes + total.prompt_bytes)} | "
            f"{readable_bytes(total_mean.row_bytes + total_mean.prompt_bytes)} | "
            f"{readable_bytes(total.prompt_bytes)} | "
            f"{readable_bytes(total.row_memory + total.prompt_memory)} | "
            f"{(total.sample_flops + total.prompt_flops) / 1e18:.2f} |"
        )
    text = "\n".join(
        [
            "# What encoding takes",
            "",
            "Written by `benchmarks/encoding_costs.py`, computed from the sizes of the published models: latents and",
            "embeddings in 16 bit, prompts with their padding, a multiplication and an addition as two operations, GB",
            "of 10^9 bytes.",
            "",
            *each,
            "",
            f"Pick-a-Pic v2, {ROWS:,} pairs with {PROMPTS:,} prompts. Memory is that of each process, for keys and",
            "places; latents stay on the disk.",
            "",
            *whole,
            "",
        ]
    )
    (RESULTS / "encoding_costs.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
