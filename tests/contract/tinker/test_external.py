"""Checkpoints for download: plain, or encrypted to the keys that the client has named."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pyrage
import pytest
import tinker

from tests.contract.tinker.support import rest_of
from tests.support.stack import RunningStack
from web.tinker.external import PREFIX

FILES = {"adapter_config.json", "adapter_model.safetensors"}


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
        assert len(content) == int(answer.headers["Content-Length"])
        return content


def contents(stack: RunningStack, path: str) -> dict[str, bytes]:
    urls = rest_of(stack).get_external_weights_urls(path).result().urls
    return {name: fetched(url) for name, url in urls.items()}


def test_an_encrypted_export_is_read_by_its_recipients_alone(
    stack: RunningStack, model: Any
) -> None:
    mine, hers, others = (pyrage.x25519.Identity.generate() for _ in range(3))
    recipients = [str(mine.to_public()), str(hers.to_public())]
    plain = contents(stack, model.save_weights_external("plain").result().path)
    saved = model.save_weights_external("sealed", age_encryption_recipients=recipients).result()
    sealed = contents(stack, saved.path)
    assert set(plain) == FILES and set(sealed) == {f"{name}.age" for name in FILES}
    for identity in (mine, hers):
        opened = {name: pyrage.decrypt(sealed[f"{name}.age"], [identity]) for name in FILES}
        assert opened == plain
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(sealed["adapter_config.json.age"], [others])
    assert json.loads(plain["adapter_config.json"])["r"] == 8


def test_a_file_of_many_blocks_is_whole(stack: RunningStack, service: Any) -> None:
    identity = pyrage.x25519.Identity.generate()
    model = service.create_lora_training_client(base_model="tiny", rank=64).result()
    wide = model.save_weights_external("wide").result().path
    recipients = [str(identity.to_public())]
    sealed = model.save_weights_external("sealed", age_encryption_recipients=recipients).result()
    name = "adapter_model.safetensors"
    plain = contents(stack, wide)[name]
    assert len(plain) > 8 * 64 * 1024
    assert pyrage.decrypt(contents(stack, sealed.path)[f"{name}.age"], [identity]) == plain


def test_the_address_of_an_encrypted_file_gives_nothing_else(
    stack: RunningStack, model: Any
) -> None:
    identity = pyrage.x25519.Identity.generate()
    recipients = [str(identity.to_public())]
    saved = model.save_weights_external("closed", age_encryption_recipients=recipients).result()
    rest = rest_of(stack)
    url = rest.get_external_weights_urls(saved.path).result().urls["adapter_config.json.age"]
    assert PREFIX in url and fetched(url).startswith(b"age-encryption.org/v1")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(url.removesuffix(".age"))
    rest.delete_checkpoint_from_tinker_path(saved.path).result()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(url)


@pytest.mark.parametrize("recipients", [["age1zz"], ["ssh-ed25519 AAAA"], [""], ["a,b"]])
def test_wrong_recipients_fail_on_their_own_future(model: Any, recipients: list[str]) -> None:
    bad = model.save_weights_external("wrong", age_encryption_recipients=recipients)
    with pytest.raises(tinker.RequestFailedError, match=r"age_encryption_recipients\.0") as caught:
        bad.result()
    assert caught.value.category == "user"
    assert model.save_state("after", overwrite=True).result().path
