"""rewardsignal: the Python SDK of Signal, a training API for language models.

import rewardsignal

with rewardsignal.SignalClient() as client, client.create_run("SmolLM2-135M-Instruct") as run:
    run.forward_backward([{"text": "Hello, world!"}])
    run.optim_step(learning_rate=1e-4)
    print(run.sample("Hello").outputs)
"""

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
from rewardsignal._futures import APIFuture, wait_all
from rewardsignal._pipeline import Pipeline
from rewardsignal._records import Record
from rewardsignal._run import SignalRun
from rewardsignal._version import __version__

__all__ = [
    "APIFuture",
    "AuthenticationError",
    "AuthorizationError",
    "ConflictError",
    "InvalidOperationError",
    "NotFoundError",
    "OperationCancelledError",
    "OperationConflictError",
    "OperationFailedError",
    "PayloadTooLargeError",
    "Pipeline",
    "RateLimitError",
    "Record",
    "ServerError",
    "SignalAPIError",
    "SignalClient",
    "SignalConnectionError",
    "SignalRun",
    "SignalTimeoutError",
    "ValidationError",
    "__version__",
    "wait_all",
]
