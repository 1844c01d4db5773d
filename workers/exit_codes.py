"""What a worker's child says by the status it exits with; the agent decides by it. Torch-free."""

from __future__ import annotations

# The running operation has left the device unusable (a CUDA error): it is the operation's doing.
DEVICE_BROKEN = 71
