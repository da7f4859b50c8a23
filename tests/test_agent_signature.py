"""The signature is the Standard Webhooks one: an independent library takes it."""

from __future__ import annotations

import base64
import time

import pytest
from agent_support import KEY, TOKEN
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

import agent

BODY = b'{"version":1,"host_id":"pve-host-01"}'


def test_the_library_accepts_it():
    headers = agent.webhook_headers(KEY, BODY, int(time.time()))
    assert Webhook(TOKEN).verify(BODY.decode(), headers) == {"version": 1, "host_id": "pve-host-01"}


@pytest.mark.parametrize("change", ["webhook-id", "webhook-timestamp", "body"])
def test_the_library_refuses_it_when_anything_signed_was_changed(change):
    headers = agent.webhook_headers(KEY, BODY, int(time.time()))
    body = BODY
    if change == "body":
        body = BODY.replace(b"01", b"02")
    elif change == "webhook-id":
        headers[change] += "x"
    else:
        headers[change] = str(int(headers[change]) + 1)
    with pytest.raises(WebhookVerificationError):
        Webhook(TOKEN).verify(body.decode(), headers)


def test_known_signature():
    """The worked example of the Standard Webhooks specification."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = agent.sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_same_content_has_the_same_id_at_every_attempt():
    body = agent.pack(BODY)
    first, second = agent.webhook_headers(KEY, body, 1), agent.webhook_headers(KEY, agent.pack(BODY), 2)
    assert first["webhook-id"] == second["webhook-id"]
    assert first["webhook-signature"] != second["webhook-signature"]
    assert agent.webhook_headers(KEY, agent.pack(BODY + b" "), 1)["webhook-id"] != first["webhook-id"]
