"""The HTTP interface, over real sockets: answers, refusals, metrics, its own description, and a browser."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from served import served

from dstrain.serve.app import MAX_INPUTS, Limits, make_app

TOKEN = "a-token-of-enough-letters"


def lengths(inputs: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """A model that a test can foresee."""
    return [{"label": values[0].strip()[:3], "characters": sum(map(len, values))} for values in inputs]


def test_predictions_come_in_the_order_of_the_inputs_and_are_counted() -> None:
    with served(make_app("lengths", lengths, limits=Limits(batch_rows=2))) as address:
        inputs = [f"{number} " + "x" * number for number in range(7)]
        answer = httpx.post(f"{address}/predict", json={"inputs": inputs})
        assert answer.status_code == 200
        assert answer.json() == {"predictions": lengths([(text,) for text in inputs])}
        httpx.post(f"{address}/predict", json={"inputs": []})
        metrics = httpx.get(f"{address}/metrics").text
    assert 'dstrain_requests_total{code="200"} 1.0' in metrics
    assert 'dstrain_requests_total{code="422"} 1.0' in metrics
    assert "dstrain_batch_rows_sum 7.0" in metrics
    assert "dstrain_batch_rows_count 4.0" in metrics
    assert "dstrain_queue_rows 0.0" in metrics


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"{", 422, "JSON"),
        (b'{"texts": ["a"]}', 422, "inputs"),
        (b'{"inputs": "a"}', 422, "list"),
        (b'{"inputs": ["  "]}', 422, "pattern"),
        ('{"inputs": ["\u0085\ufeff"]}'.encode(), 422, "pattern"),
        (b'{"inputs": [""]}', 422, "at least 1"),
        (b'{"inputs": [7]}', 422, "string"),
        (json.dumps({"inputs": ["a"] * (MAX_INPUTS + 1)}).encode(), 422, "at most 256"),
        (b'{"inputs": ["' + b"a" * 100_001 + b'"]}', 422, "100000"),
        (b'{"inputs": ["' + b"a" * 200_000 + b'"]}', 413, "200000 bytes"),
        (b'{"inputs": ["\xff"]}', 400, ""),
    ],
)
@pytest.mark.slow
def test_a_bad_request_is_told_what_is_wrong(body: bytes, code: int, says: str) -> None:
    with served(make_app("lengths", lengths, limits=Limits(body_bytes=200_000))) as address:
        headers = {"Content-Type": "application/json"}
        announced = httpx.post(f"{address}/predict", content=body, headers=headers)
        chunked = httpx.post(f"{address}/predict", content=iter([body[:100], body[100:]]), headers=headers)
    for answer in (announced, chunked):
        assert answer.status_code == code
        assert says in answer.text


def test_only_bearers_of_the_token_get_predictions_and_metrics() -> None:
    with served(make_app("lengths", lengths, limits=Limits(), token=TOKEN)) as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            refused = httpx.post(f"{address}/predict", json={"inputs": ["a"]}, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert httpx.get(f"{address}/metrics", headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(f"{address}/predict", json={"inputs": ["a"]}, headers=right).status_code == 200
        assert httpx.get(f"{address}/ready").json() == {"status": "ready"}


def test_a_full_queue_says_429_and_a_late_answer_504_and_nothing_else_fails() -> None:
    gate = threading.Event()

    def slow(inputs: list[tuple[str, ...]]) -> list[dict[str, Any]]:
        gate.wait(30)
        return lengths(inputs)

    limits = Limits(batch_rows=1, queue_rows=2, threads=1, timeout_seconds=1.0)
    with served(make_app("slow", slow, limits=limits)) as address, ThreadPoolExecutor(8) as clients:
        pending = [clients.submit(httpx.post, f"{address}/predict", json={"inputs": [str(n)]}) for n in range(8)]
        answers = [each.result() for each in pending]
        assert sorted(answer.status_code for answer in answers) == [429] * 5 + [504] * 3
        assert all(answer.headers["Retry-After"] == "1" for answer in answers if answer.status_code == 429)
        assert httpx.get(f"{address}/health").status_code == 200
        gate.set()
        assert httpx.post(f"{address}/predict", json={"inputs": ["a"]}).status_code == 200


def test_a_failing_model_says_500_and_the_server_goes_on() -> None:
    def picky(inputs: list[tuple[str, ...]]) -> list[dict[str, Any]]:
        if ("13",) in inputs:
            raise RuntimeError("unlucky")
        return lengths(inputs)

    with served(make_app("picky", picky, limits=Limits())) as address:
        assert httpx.post(f"{address}/predict", json={"inputs": ["13"]}).status_code == 500
        assert httpx.post(f"{address}/predict", json={"inputs": ["12"]}).status_code == 200


def test_a_model_of_several_fields_takes_objects_and_nothing_else() -> None:
    fields = ("question", "context")
    with served(make_app("answers", lengths, fields=fields, limits=Limits())) as address:
        given = {"question": "who?", "context": "Ada was here."}
        answer = httpx.post(f"{address}/predict", json={"inputs": [given]})
        assert answer.json() == {"predictions": [{"label": "who", "characters": 17}]}
        for wrong in ("who?", {"question": "who?"}, given | {"more": "x"}, given | {"context": " "}):
            assert httpx.post(f"{address}/predict", json={"inputs": [wrong]}).status_code == 422
        assert '["question", "context"]' in httpx.get(address).text
        schema = httpx.get(f"{address}/openapi.json").json()["components"]["schemas"]
        assert schema["Input"]["required"] == ["question", "context"]


# ---------------------------------------------------------------- its own description, tried by schemathesis

# A body that is too large is refused with 413, whether its texts would have been right or wrong.
_config = schemathesis.Config.from_dict(
    {
        "checks": {
            "negative_data_rejection": {"expected-statuses": [400, 401, 413, 422]},
            "positive_data_acceptance": {"expected-statuses": ["2xx", 413]},
        }
    }
)
_schemas = {
    token: schemathesis.openapi.from_asgi(
        "/openapi.json", make_app("lengths", lengths, limits=Limits(), token=token), config=_config
    )
    for token in (None, TOKEN)
}


@_schemas[None].parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.slow
def test_the_server_does_what_its_openapi_description_says(case: schemathesis.Case) -> None:
    case.call_and_validate()


@_schemas[TOKEN].parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_so_does_a_server_that_asks_for_a_token(case: schemathesis.Case) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})


# ---------------------------------------------------------------- the page, in a real browser


@pytest.mark.browser
def test_the_page_shows_predictions_and_refusals_and_runs_nothing_from_a_text(tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs a browser; run: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   f"--user-data-dir={tmp_path / 'browser'}"):  # fmt: skip
        options.add_argument(switch)
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        with served(make_app("lengths", lengths, limits=Limits(), token=TOKEN)) as address:
            browser.get(address)
            message = browser.find_element(By.ID, "message")
            browser.find_element(By.ID, "field-text").send_keys(f"one\n{hostile}\n")
            browser.find_element(By.TAG_NAME, "button").click()
            WebDriverWait(browser, 20).until(lambda _: "token" in message.text)
            browser.find_element(By.TAG_NAME, "summary").click()
            browser.find_element(By.ID, "token").send_keys(TOKEN)
            browser.find_element(By.TAG_NAME, "button").click()
            WebDriverWait(browser, 20).until(lambda _: "ms" in message.text)
            cells = [
                [cell.text for cell in line.find_elements(By.CSS_SELECTOR, "td, th")]
                for line in browser.find_elements(By.TAG_NAME, "tr")
            ]
            assert cells == [["text", "label", "characters"], ["one", "one", "3"], [hostile, "<im", str(len(hostile))]]
            assert browser.title == "dstrain: try the model"
            browser.get(f"{address}/docs")  # drawn without a network
            WebDriverWait(browser, 20).until(lambda _: "/predict" in browser.find_element(By.TAG_NAME, "body").text)
    finally:
        browser.quit()
