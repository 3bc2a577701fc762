"""A reward on a server, so that a large model or one with packages of its own runs elsewhere.

The protocol. A request is a POST of JSON:

    {
      "prompts": ["a red circle", ...],
      "samples": [
        {"type": "image", "format": "png", "data": "<base64>"},
        {"type": "video", "format": "png", "frames": ["<base64>", ...]},
        {"type": "audio", "format": "wav", "data": "<base64>"}
      ],
      "columns": {"fps": [8, 8], ...}
    }

`columns` holds the columns that were asked for, lists with one entry per sample; images in them, such as those that
were edited, are like samples. The answer is JSON with one number
per sample, in order:

    {"scores": [1.5, ...]}

An error is any status of 400 and above; its body is shown to the user. 408, 429, 500, 502, 503 and 504 are tried
again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.decode.cell import CellProblem
from .client import ServerError, check_url, post_json
from .media import Media, as_json, column_as_json, decode_sample
from .scoring import RewardError, checked_scores, column_slice


class ServerReward:
    """What the rewards on servers have in common.

    Args:
        url: Of the server.
        name: Scores are logged as `scores/<name>`.
        timeout: Seconds without an answer until an attempt has failed.
        retries: Attempts after the first one.
        retry_wait: Seconds before the first of them; doubled each time.
        headers: Sent with each request, for example for authorisation.

    Raises:
        ValueError: `url` is not of HTTP, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        timeout: float,
        retries: int,
        retry_wait: float,
        headers: Mapping[str, str] | None,
    ) -> None:
        if not timeout > 0 or retries < 0 or retry_wait < 0:
            raise ValueError(
                f"timeout={timeout}, retries={retries}, retry_wait={retry_wait}; timeout must be above 0, the others "
                "0 or more"
            )
        self.url = check_url(url)
        self.name = self.__name__ = name
        self.timeout, self.retries, self.retry_wait = timeout, retries, retry_wait
        self.headers = dict(headers or {})

    def _decoded(self, sample: Any, index: int) -> Media:
        try:
            return decode_sample(sample)
        except CellProblem as problem:
            raise RewardError(self.name, str(problem), index) from problem

    def _post(self, url: str, body: Mapping[str, Any], samples: str) -> Any:
        """The server's answer; `samples` says for messages which are in the body."""
        try:
            return post_json(
                url,
                body,
                headers=self.headers,
                timeout=self.timeout,
                retries=self.retries,
                wait=self.retry_wait,
            )
        except ServerError as error:
            raise RewardError(self.name, f"{error} ({samples})") from error


class HTTPReward(ServerReward):
    """Scores from a server that speaks the protocol above.

    Args:
        url: That requests are posted to.
        columns: Names of the columns that the server gets.
        batch_size: Samples in one request.
        name, timeout, retries, retry_wait, headers: See `ServerReward`.

    Raises:
        ValueError: See `ServerReward`, or `batch_size` is not a positive integer.
    """

    def __init__(
        self,
        url: str,
        *,
        columns: Sequence[str] = (),
        name: str = "http",
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        retry_wait: float = 1.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(url, name=name, timeout=timeout, retries=retries, retry_wait=retry_wait, headers=headers)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be a positive integer")
        self.columns, self.batch_size = tuple(columns), batch_size

    def __call__(self, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> list[float]:
        """Scores images, videos (lists of frames) or audio.

        Raises:
            RewardError: A sample that cannot be decoded, a server that does not answer, or another answer than one
                finite number per sample.
            ValueError: Another number of prompts than of samples, or a column that is missing.
        """
        if len(prompts) != len(samples):
            raise ValueError(f"{len(prompts)} prompts for {len(samples)} samples; pass one prompt per sample")
        missing = [column for column in self.columns if column not in columns]
        if missing:
            raise ValueError(f"reward '{self.name}' sends the column '{missing[0]}', which was not passed")
        wanted = {column: columns[column] for column in self.columns}
        scores: list[float] = []
        for first in range(0, len(samples), self.batch_size):
            last = min(first + self.batch_size, len(samples))
            body = {
                "prompts": list(prompts[first:last]),
                "samples": [as_json(self._decoded(samples[index], index)) for index in range(first, last)],
                "columns": {
                    name: column_as_json(values)
                    for name, values in column_slice(wanted, len(samples), first, last).items()
                },
            }
            which = f"samples {first} to {last - 1}"
            answer = self._post(self.url, body, which)
            if not isinstance(answer, dict) or "scores" not in answer:
                raise RewardError(self.name, f"{self.url} answered without 'scores' ({which}): {str(answer)[:300]}")
            try:
                scores += checked_scores(self.name, answer["scores"], last - first)
            except RewardError as error:
                # Counted within the request.
                index = None if error.sample is None else first + error.sample
                raise RewardError(self.name, f"{self.url} {error.problem} ({which})", index) from error
        return scores
