"""What an inspection prints of each subject, in lines of at most 100 columns, paths and prompts aside."""

import textwrap
from collections.abc import Iterable, Mapping

from ..data.cache import readable_bytes
from .parts import BadRows, Duplicates, EncodedSize, Finding, Prompts, Samples, Sizes


_WIDTH, _NAME, _BAR = 100, 20, 30


def line(name: str, text: str) -> list[str]:
    """A name and what is said of it, wrapped below each other."""
    indent = " " * (_NAME + 4)
    wrapper = textwrap.TextWrapper(_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(f"  {name:{_NAME}}  {text}")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({number})" for name, number in counts.items())


def _quoted(text: str, length: int = 60) -> str:
    """A text on one line, cut where it is long."""
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= length else f'"{text[:length]}..."'


def bad_row_lines(bad: BadRows) -> Iterable[str]:
    """How many by kind, and the first ten."""
    yield from line("bad rows", f"{bad.count}: {_counts(bad.kinds)}" if bad.count else "none")
    for problem in bad.examples:
        yield from line("", f"row {problem['row']}, {problem['place']}: {problem['reason']}")
    if bad.count and bad.count > len({problem["row"] for problem in bad.examples}):
        yield from line("", "...")


def prompt_lines(prompts: Prompts) -> Iterable[str]:
    """How many, how long, and how many are cut."""
    repeated = f"{prompts.repeated or 'none'} in several rows"
    yield from line("prompts", f"{prompts.distinct} distinct ones in {prompts.rows} rows, {repeated}")
    for text, count in list(prompts.most_repeated.items())[:3]:
        yield from line("", f"{count} x {_quoted(text)}")
    if prompts.characters is not None and prompts.words is not None:
        yield from line("  characters", str(prompts.characters))
        yield from line("  words", str(prompts.words))
    for name, tokens in prompts.tokens.items():
        cut = f"none is cut at {tokens.limit}"
        if tokens.cut:
            cut = f"{tokens.cut} of {prompts.distinct} are cut at {tokens.limit}, in {tokens.cut_rows} rows"
        yield from line(f"  {name}", f"{tokens.lengths} tokens; {cut}")
        for text in tokens.examples[:3]:
            yield from line("", _quoted(text))


def sample_lines(samples: Samples) -> Iterable[str]:
    """How many, how long and how large."""
    noun = {"image": "images", "video": "videos", "audio": "audio"}[samples.kind]
    yield from line(noun, f"{samples.count} that can be decoded")
    if samples.frames is not None:
        yield from line("  frames", str(samples.frames))
    if samples.seconds is not None:
        yield from line("  seconds", str(samples.seconds))
    if samples.rates:
        yield from line("  samples a second", _counts(samples.rates))
        yield from line("  channels", _counts(samples.channels))
    if samples.sizes is not None:
        yield from _sizes(samples.sizes)


def _sizes(sizes: Sizes) -> Iterable[str]:
    more = f" and {sizes.distinct - len(sizes.most_frequent)} more" * (sizes.distinct > len(sizes.most_frequent))
    yield from line("  sizes", f"{_counts(sizes.most_frequent)}{more}")
    yield from line("  shorter side", f"{sizes.shorter_side} px")
    height, width = sizes.resolution
    smaller = f"; {sizes.smaller} are smaller and scaled up" if sizes.smaller else ""
    cropped = f"cropping removes {sizes.cropped:.1%} of a sample's pixels, {sizes.cropped_most:.0%} at most"
    yield from line(f"  at {width}x{height} px", cropped + smaller)
    if sizes.buckets:
        yield from line(
            "  in buckets",
            f"cropping removes {sizes.cropped_in_buckets:.1%}, {sizes.cropped_most_in_buckets:.0%} at most, in "
            f"{len(sizes.buckets)} of them (width x height, rows)",
        )
        most = max(bucket.rows for bucket in sizes.buckets)
        for bucket in sizes.buckets:
            bar = "#" * max(round(_BAR * bucket.rows / most), 1)
            yield f"  {'':{_NAME}}  {f'{bucket.width}x{bucket.height}':>10} {bucket.rows:>8} {bar}"
    if sizes.different_shapes.count:
        text = f"{sizes.different_shapes.count} pairs differ in shape by more than 1.5"
        yield from line("  shapes", text)


def duplicate_lines(duplicates: Duplicates, pairs: bool) -> Iterable[str]:
    """What is there more than once, with the first three of each."""
    several = duplicates.equal_across_prompts
    across = f", {several} of them under several prompts" if several else ""
    yield from _finding("equal samples", duplicates.equal, "group", across)
    yield from _finding("similar samples", duplicates.similar, "group")
    if duplicates.blank.count:
        yield from _finding("blank images", duplicates.blank, "image")
    if pairs:
        yield from _finding("identical pairs", duplicates.identical_pairs, "row")
        yield from _finding("similar pairs", duplicates.similar_pairs, "row")
        yield from _finding("repeated pairs", duplicates.repeated_pairs, "group")
        yield from _finding("contradictory", duplicates.contradictory_pairs, "group")
    if duplicates.unedited_chosen is not None and duplicates.unedited_rejected is not None:
        yield from _finding("chosen = source", duplicates.unedited_chosen, "row")
        yield from _finding("rejected = source", duplicates.unedited_rejected, "row")


def _finding(name: str, finding: Finding, noun: str, more: str = "") -> Iterable[str]:
    if not finding.count:
        yield from line(name, "none")
        return
    of_rows = "" if noun == "row" else f" in {len(finding.rows)} rows"
    yield from line(name, f"{finding.count} {noun}{'s' * (finding.count != 1)}{of_rows}{more}")
    for example in finding.examples[:3]:
        yield from line("", " = ".join(example[:4]) + " = ..." * (len(example) > 4))
    if finding.count > 3:
        yield from line("", "...")


def encoded_lines(encoded: EncodedSize, model: str) -> Iterable[str]:
    """What the data take on disk once they are encoded."""
    text = f"{readable_bytes(encoded.bytes_per_row)} a row"
    if encoded.bytes_per_row_mean != encoded.bytes_per_row:
        text += f" ({readable_bytes(encoded.bytes_per_row_mean)} with latent_sampling='mean')"
    if encoded.bytes_per_prompt is not None:
        text += f", at most {readable_bytes(encoded.bytes_per_prompt)} a prompt"
    yield from line("encoded", f"{readable_bytes(encoded.total)} on disk for {model}: {text}")
