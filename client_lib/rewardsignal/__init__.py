"""rewardsignal: the Python SDK of Signal, a training API for language models.

import rewardsignal

with rewardsignal.SignalClient() as client, client.create_run("SmolLM2-135M-Instruct") as run:
    run.forward_backward([{"text": "Hello, world!"}])
    run.optim_step(learning_rate=1e-4)
    print(run.sample("Hello").outputs)
"""

from rewardsignal._async_client import AsyncSignalClient
from rewardsignal._async_run import AsyncSignalRun
from rewardsignal._client import SignalClient
from rewardsignal._exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConflictError,
    InvalidOperationError,
    NotFoundError,
    OperationCancelledError,
    OperationConflictError,
    OperationFailedError,
    PayloadTooLargeError,
    RateLimitError,
    ServerError,
    SignalAPIError,
    SignalConnectionError,
    SignalTimeoutError,
    ValidationError,
)
from rewardsignal._futures import APIFuture
from rewardsignal._group import FutureGroup, as_completed, wait_all
from rewardsignal._inference import InferenceClient
from rewardsignal._pages import PagedList
from rewardsignal._pipeline import Pipeline
from rewardsignal._records import Record
from rewardsignal._run import SignalRun
from rewardsignal._stream import SampleStream, StreamToken
from rewardsignal._tokenizer import Tokenizer
from rewardsignal._training import TrainingClient
from rewardsignal._version import __version__

__all__ = [
    "APIFuture",
    "AsyncSignalClient",
    "AsyncSignalRun",
    "AuthenticationError",
    "AuthorizationError",
    "ConflictError",
    "FutureGroup",
    "InferenceClient",
    "InvalidOperationError",
    "NotFoundError",
    "OperationCancelledError",
    "OperationConflictError",
    "OperationFailedError",
    "PagedList",
    "PayloadTooLargeError",
    "Pipeline",
    "RateLimitError",
    "Record",
    "SampleStream",
    "ServerError",
    "SignalAPIError",
    "SignalClient",
    "SignalConnectionError",
    "SignalRun",
    "SignalTimeoutError",
    "StreamToken",
    "Tokenizer",
    "TrainingClient",
    "ValidationError",
    "__version__",
    "as_completed",
    "wait_all",
]
