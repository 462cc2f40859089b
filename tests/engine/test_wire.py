"""What ranks say to each other arrives as it was said, arrays and all, and nothing else arrives."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from minisgl.config import Config
from minisgl.core.plan import StepPlan
from minisgl.distributed.messages import Assign, Finish, Launch, RankFailed, encoder, from_rank_decoder, to_rank_decoder
from minisgl.gpu.memory import prefill_plan


def equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, msgspec.Struct):
        return type(one) is type(other) and all(
            equal(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__
        )
    return bool(one == other)


@pytest.mark.parametrize("everything", [False, True])
def test_a_plan_arrives_whole_and_is_the_receivers_own(everything: bool) -> None:
    plan = prefill_plan(3, 5, everything)
    message = to_rank_decoder().decode(encoder().encode(Launch(plan)))
    assert isinstance(message, Launch)
    assert isinstance(message.plan, StepPlan)
    assert equal(message.plan, plan)
    message.plan.prefill_tokens[:] = 7
    assert not plan.prefill_tokens.any()


def test_masks_and_assignments_arrive() -> None:
    masks = np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]
    message = to_rank_decoder().decode(encoder().encode(Finish(masks)))
    assert isinstance(message, Finish)
    assert equal(message.masks, masks)
    order = Assign(Config(tp=2, dummy_weight=True), "/a/b", 100)
    assert to_rank_decoder().decode(encoder().encode(order)) == order
    failed = RankFailed(1, "why", True)
    assert from_rank_decoder().decode(encoder().encode(failed)) == failed


def test_what_has_no_place_in_a_message_is_refused() -> None:
    said = msgspec.msgpack.encode({"type": "finish", "masks": ["|O8", [1], b"\0" * 8]})
    with pytest.raises((ValueError, msgspec.ValidationError), match="no place in a message"):
        to_rank_decoder().decode(said)
    with pytest.raises(msgspec.ValidationError):
        to_rank_decoder().decode(msgspec.msgpack.encode({"type": "run", "code": "x"}))
