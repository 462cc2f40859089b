"""Messages between rank 0 and the workers arrive as they were sent, arrays too, and nothing else is accepted."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from minisgl.config import Config
from minisgl.distributed import messages
from minisgl.distributed.messages import FinishStep, FromWorker, LaunchStep, LoadModel, ToWorker, WorkerFailed
from minisgl.gpu.memory import prefill_plan


def equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, msgspec.Struct):
        return type(one) is type(other) and all(
            equal(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__
        )
    return bool(one == other)


@pytest.mark.parametrize(
    "message",
    [
        LaunchStep(prefill_plan(3, 5, False)),
        LaunchStep(prefill_plan(3, 5, True)),
        FinishStep(np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]),
        LoadModel(Config(tp=2, dummy_weight=True), "/a/b", 100),
        WorkerFailed(1, "why", True),
    ],
)
def test_messages_arrive_as_they_were_sent(message: ToWorker | FromWorker) -> None:
    data = messages.ENCODER.encode(message)
    decoder = messages.FROM_WORKER if isinstance(message, WorkerFailed) else messages.TO_WORKER
    assert equal(decoder.decode(data), message)


def test_the_arrays_of_a_plan_are_the_receivers_own() -> None:
    plan = prefill_plan(3, 5, True)
    received = messages.TO_WORKER.decode(messages.ENCODER.encode(LaunchStep(plan)))
    assert isinstance(received, LaunchStep)
    received.plan.prefill_tokens[:] = 7
    assert not plan.prefill_tokens.any()


def test_other_messages_and_arrays_are_refused() -> None:
    with pytest.raises((ValueError, msgspec.ValidationError), match="cannot be received in a message"):
        messages.TO_WORKER.decode(msgspec.msgpack.encode({"type": "finish", "masks": ["|O8", [1], b"\0" * 8]}))
    with pytest.raises(msgspec.ValidationError):
        messages.TO_WORKER.decode(msgspec.msgpack.encode({"type": "run", "code": "x"}))
