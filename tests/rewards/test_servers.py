"""Rewards on servers, against real servers on loopback."""

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
from helpers.media import frames
from helpers.reward_models import images
from PIL import Image

from trl_diffusion_pref.data.decode.audio import Waveform
from trl_diffusion_pref.rewards import HTTPReward, OpenAIServerReward, RewardError, score


class Server(ThreadingHTTPServer):
    """Answers POSTs by a function of (path, body, headers), and remembers them."""

    daemon_threads = True

    def __init__(self, answer: Callable) -> None:
        self.requests: list[tuple[str, dict, dict]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body, dict(self.headers)))
                found = answer(body, len(server.requests))
                status, text = found if isinstance(found, tuple) else (200, json.dumps(found))
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())
                # The client did not wait.
                except BrokenPipeError:
                    pass

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(answer: Callable) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def picture(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def mean_colour(body, number):
    return {"scores": [float(picture(sample["data"]).mean()) for sample in body["samples"]]}


SAMPLES = images((4, 3), (5, 5), (3, 8), (2, 2), (6, 1))
MEANS = [np.asarray(image).mean() for image in SAMPLES]
PROMPTS = ["a", "b", "c", "d", "e"]


def test_images_are_scored_in_batches_with_the_asked_columns():
    with serving(mean_colour) as server:
        reward = HTTPReward(server.url + "/", columns=["style"], batch_size=2, headers={"X-Key": "k"})
        assert reward(PROMPTS, SAMPLES, style=[1, 2, 3, 4, 5], other=3) == pytest.approx(MEANS)
        with pytest.raises(ValueError, match="reward 'http' sends the column 'style', which was not passed"):
            reward(PROMPTS, SAMPLES)
    assert [body["prompts"] for _, body, _ in server.requests] == [["a", "b"], ["c", "d"], ["e"]]
    assert [body["columns"] for _, body, _ in server.requests] == [{"style": part} for part in ([1, 2], [3, 4], [5])]
    path, body, headers = server.requests[0]
    assert (path, headers["X-Key"], body["samples"][0]["type"]) == ("/v1", "k", "image")
    np.testing.assert_array_equal(picture(body["samples"][0]["data"]), np.asarray(SAMPLES[0]))


def test_videos_and_audio_arrive_unchanged():
    waveform = Waveform(torch.tensor([[0.5, -1.25, 0.0], [1e-4, 0.25, -0.5]]), 16000)
    video = frames(0, 3)
    with serving(lambda body, number: {"scores": [1, 2]}) as server:
        assert HTTPReward(server.url)(["a", "b"], [video, waveform]) == [1.0, 2.0]
    sent_video, sent_audio = server.requests[0][1]["samples"]
    for frame, sent in zip(video, sent_video["frames"], strict=True):
        np.testing.assert_array_equal(picture(sent), np.asarray(frame))
    values, rate = soundfile.read(io.BytesIO(base64.b64decode(sent_audio["data"])), dtype="float32")
    assert (sent_video["type"], sent_audio["type"], rate) == ("video", "audio", 16000)
    np.testing.assert_array_equal(values.T, waveform.samples.numpy())


def test_passing_failures_are_tried_again_up_to_the_limit():
    def second_time(body, number):
        return (503, "loading") if number < 3 else mean_colour(body, number)

    with serving(second_time) as server:
        assert HTTPReward(server.url, retries=2, retry_wait=0.01)(PROMPTS, SAMPLES) == pytest.approx(MEANS)
    with serving(second_time) as server:
        with pytest.raises(
            RewardError, match=r"'http': http://.* answered 503 .*: loading, 2 times \(samples 0 to 4\)"
        ):
            HTTPReward(server.url, retries=1, retry_wait=0.01)(PROMPTS, SAMPLES)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body, number: (400, "no such model"), r"answered 400 .*: no such model \(samples 0 to 1\)"),
        (lambda body, number: (200, "<html>"), "answered something that is not JSON: <html>"),
        (lambda body, number: {"error": "full"}, r"answered without 'scores' \(samples 0 to 1\): .*full"),
        (lambda body, number: {"scores": [1.0]}, r"returned 1 value for 2 samples \(samples 0 to 1\)"),
        (lambda body, number: {"scores": [1, "good" if number == 2 else 2]}, "sample 3: .*'good'"),
        (lambda body, number: (200, '{"scores": [1, NaN]}'), "sample 1: .* returned nan"),
    ],
)
def test_wrong_answers_are_not_tried_again_and_name_server_and_samples(answer, message):
    with serving(answer) as server:
        with pytest.raises(RewardError, match=f"reward 'http'.*{message}"):
            HTTPReward(server.url, batch_size=2, retry_wait=0.01)(PROMPTS, SAMPLES)
        assert len(server.requests) <= 2


def test_servers_that_are_slow_or_gone_are_named():
    def slow(body, number):
        time.sleep(0.5)
        return {"scores": [1] * 5}

    with serving(slow) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match="cannot be reached .*timed out.*, 2 times"):
            HTTPReward(server.url, timeout=0.05, retries=1, retry_wait=0.01)(PROMPTS, SAMPLES)
        assert time.monotonic() - start < 0.5
    with pytest.raises(RewardError, match="reward 'http': .*cannot be reached .*refused.*, 1 times"):
        score(HTTPReward(server.url, retries=0), PROMPTS, SAMPLES)
    with pytest.raises(ValueError, match="must begin with http"):
        HTTPReward("localhost:8000")


def test_images_in_columns_are_sent_like_samples():
    with serving(mean_colour) as server:
        edited = [SAMPLES[2], [SAMPLES[3], SAMPLES[4]]]
        HTTPReward(server.url, columns=("image", "fps"))(PROMPTS[:2], SAMPLES[:2], image=edited, fps=[8, 9])
    columns = server.requests[0][1]["columns"]
    first, (second, third) = columns["image"]
    for sent, sample in zip((first, second, third), SAMPLES[2:], strict=True):
        np.testing.assert_array_equal(picture(sent["data"]), np.asarray(sample))
    assert (first["type"], columns["fps"]) == ("image", [8, 9])


def chat(text=None, logprobs=None):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}


def test_grades_are_read_from_the_answers_in_order():
    answers = {"a": "4", "b": "Grade: 3.5 of 5", "c": "10, no: 2/5", "d": "**5**", "e": "I say 1."}

    def grade(body, number):
        (_, question) = body["messages"][0]["content"]
        # The first answers last.
        time.sleep(0.1 if 'shows "a"' in question["text"] else 0)
        return chat(next(answers[name] for name in answers if f'shows "{name}"' in question["text"]))

    with serving(grade) as server:
        reward = OpenAIServerReward(server.url, "judge", api_key="secret", workers=3)
        assert reward(PROMPTS, SAMPLES) == [4.0, 3.5, 2.0, 5.0, 1.0]
        assert "secret" not in repr(reward)
    path, body, headers = server.requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"], "logprobs" in body) == ("judge", 0, False)
    image, _ = body["messages"][0]["content"]
    sent = picture(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert any(np.array_equal(sent, np.asarray(sample)) for sample in SAMPLES)


def test_a_judge_sees_what_was_edited_before_the_sample():
    with serving(lambda body, number: chat("4")) as server:
        reward = OpenAIServerReward(server.url, "judge")
        assert reward(["make it red"], SAMPLES[:1], image=[[SAMPLES[1], SAMPLES[2]]]) == [4.0]
        assert reward(["make it red"], SAMPLES[:1], image=[SAMPLES[1]]) == [4.0]
    for (_, body, _), order in zip(server.requests, ((1, 2, 0), (1, 0)), strict=True):
        *pictures, question = body["messages"][0]["content"]
        for sent, number in zip(pictures, order, strict=True):
            shown = picture(sent["image_url"]["url"].removeprefix("data:image/png;base64,"))
            np.testing.assert_array_equal(shown, np.asarray(SAMPLES[number]))
        assert 'by the instruction "make it red". Grade how well' in question["text"]


def test_the_probability_of_yes_sums_its_spellings():
    top = [("Yes", 0.5), (" yes", 0.2), ("No", 0.2), ("Yesterday", 0.05)]
    entries = [{"token": token, "logprob": math.log(value)} for token, value in top]
    with serving(lambda body, number: chat("Yes", {"content": [{"top_logprobs": entries}]})) as server:
        reward = OpenAIServerReward(
            server.url, "judge", mode="yes", question="Is {prompt} in this {kind}?", max_frames=3
        )
        assert reward(["a {kind}"], [frames(0, 7)]) == pytest.approx([0.7])
    body = server.requests[0][1]
    *pictures, question = body["messages"][0]["content"]
    assert (body["max_tokens"], body["logprobs"], question["text"]) == (1, True, "Is a {kind} in this video?")
    for sent, index in zip(pictures, (0, 3, 6), strict=True):
        shown = picture(sent["image_url"]["url"].removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(shown, np.asarray(frames(0, 7)[index]))


@pytest.mark.parametrize(
    ("mode", "answer", "message"),
    [
        ("grade", chat("I cannot see it. 7 of 10, 0.5, 6"), r"sample 0: .* without a grade \(no number from 1 to 5\)"),
        ("yes", chat("Yes", None), "sample 0: .* without a log-probability"),
        ("grade", {"choices": []}, "sample 0: .* without a grade"),
    ],
)
def test_answers_without_a_score_show_what_was_said(mode, answer, message):
    with serving(lambda body, number: answer) as server:
        with pytest.raises(RewardError, match=f"'openai_server', {message}"):
            OpenAIServerReward(server.url, "judge", mode=mode)(PROMPTS[:1], SAMPLES[:1])


def test_samples_that_cannot_be_decoded_are_not_sent():
    with serving(mean_colour) as server:
        with pytest.raises(RewardError, match="'http', sample 1: .*not an image"):
            HTTPReward(server.url)(["a", "b"], [SAMPLES[0], 7])
        assert not server.requests
    with serving(lambda body, number: chat("3")) as server:
        with pytest.raises(RewardError, match="'openai_server', sample 1: .*not an image"):
            OpenAIServerReward(server.url, "judge", workers=1, retries=0)(["a", "b"], [SAMPLES[0], 7])
