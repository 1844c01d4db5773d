"""An S3 server for tests: moto's, on loopback and a free port, and the environment that leads to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "signal-tests"


def environment(url: str) -> dict[str, str]:
    """What a client of the server at `url` needs, and what keeps this machine's own settings out."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def s3_environment(url: str) -> Iterator[None]:
    """This process's environment leads to the server at `url`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in environment(url).items():
            patch.setenv(name, value)
        yield


@contextmanager
def running_s3() -> Iterator[str]:
    """The URL of a server that has the bucket and nothing in it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        with s3_environment(url):
            boto3.session.Session(region_name="us-east-1").client("s3").create_bucket(Bucket=BUCKET)
        yield url
    finally:
        server.stop()
