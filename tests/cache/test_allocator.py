"""The free list: no page in two hands, none lost, and a wrong `free` that is refused changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minisgl.core.radix_cache import Int32, OutOfPages, PageAllocator


def pages(*ids: int) -> Int32:
    return np.array(ids, np.int32)


def test_a_new_allocator_hands_out_ascending_runs() -> None:
    allocator = PageAllocator(8)
    assert allocator.allocate(3).tolist() == [0, 1, 2]
    assert allocator.allocate(2).tolist() == [3, 4]
    assert allocator.allocate(0).tolist() == []
    assert allocator.num_free == 3


def test_pages_freed_together_come_back_in_the_same_order() -> None:
    allocator = PageAllocator(8)
    allocator.allocate(8)
    allocator.free(pages(5, 6, 7))
    assert allocator.allocate(3).tolist() == [5, 6, 7]


def test_what_was_allocated_is_a_copy() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)[:] = 3
    assert allocator.allocate(2).tolist() == [2, 3]


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(OutOfPages, match="4 pages were asked for and 3 are free"):
        allocator.allocate(4)
    assert allocator.num_free == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (pages(0, 2), "double free of page 2"),
        (pages(1, 0, 1), "double free of page 1"),
        (pages(0, 4), "not all within 0 … 3"),
        (pages(-1), "not all within 0 … 3"),
    ],
)
def test_a_wrong_free_raises_and_changes_nothing(wrong: Int32, message: str) -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(RuntimeError, match=message):
        allocator.free(wrong)
    assert sorted(allocator.free_pages().tolist()) == [2, 3]
    allocator.free(pages(0, 1))
    assert sorted(allocator.allocate(4).tolist()) == [0, 1, 2, 3]


class AllocatorMachine(RuleBasedStateMachine):
    """The model is the set of pages that are out."""

    @initialize(num_pages=st.integers(0, 40))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.num_pages = num_pages
        self.out: list[int] = []

    @rule(count=st.integers(0, 20))
    def allocate(self, count: int) -> None:
        if count > self.num_pages - len(self.out):
            with pytest.raises(OutOfPages):
                self.allocator.allocate(count)
            return
        taken = self.allocator.allocate(count).tolist()
        assert len(taken) == count
        self.out += taken

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.out:
            back = data.draw(st.lists(st.sampled_from(self.out), unique=True))
            self.allocator.free(np.array(back, np.int32))
            self.out = [page for page in self.out if page not in back]

    @rule(data=st.data())
    def free_wrongly(self, data: st.DataObject) -> None:
        wrong = data.draw(st.lists(st.integers(-2, self.num_pages + 1), min_size=1, max_size=5))
        if len(set(wrong)) < len(wrong) or not set(wrong) <= set(self.out):
            with pytest.raises(RuntimeError):
                self.allocator.free(np.array(wrong, np.int32))

    @invariant()
    def each_page_is_free_or_out(self) -> None:
        if hasattr(self, "allocator"):
            assert len(set(self.out)) == len(self.out)
            assert self.allocator.num_free == self.num_pages - len(self.out)
            assert sorted(self.allocator.free_pages().tolist() + self.out) == list(range(self.num_pages))


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
