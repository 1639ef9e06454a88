"""Nothing is drawn for somebody who has left the page."""

from __future__ import annotations

from collections.abc import Callable

from ditc.runtime.serving.ui.visitors import MOST_UNREAD, MOST_VISITS, Visitors


def counter() -> tuple[list[str], Callable[[], None]]:
    calls: list[str] = []
    return calls, lambda: calls.append("cancelled")


def test_work_is_cancelled_when_the_last_stream_of_the_visit_ends() -> None:
    visitors, (calls, cancel) = Visitors(), counter()
    with visitors.streaming("a"):
        with visitors.streaming("a"), visitors.working("a", cancel):
            pass
        calls.clear()
        first, second = visitors.streaming("b"), visitors.streaming("b")
        first.__enter__(), second.__enter__()
        with visitors.working("b", cancel):
            first.__exit__(None, None, None)
            assert calls == []
            second.__exit__(None, None, None)
            assert calls == ["cancelled"]


def test_cancelling_one_visit_leaves_the_others() -> None:
    visitors, (calls, cancel) = Visitors(), counter()
    with visitors.streaming("a"), visitors.streaming("b"), visitors.working("a", cancel):
        visitors.cancel("b")
        assert calls == []
        visitors.cancel("a")
        assert calls == ["cancelled"]


def test_work_that_begins_after_the_page_was_closed_is_cancelled_at_once() -> None:
    visitors, (calls, cancel) = Visitors(), counter()
    with visitors.working("a", cancel):
        assert calls == ["cancelled"]


def test_a_visit_that_reads_nothing_is_known_to() -> None:
    visitors = Visitors()
    assert not visitors.is_streaming("a", wait=0.0)
    with visitors.streaming("a"):
        assert visitors.is_streaming("a", wait=0.0)
    assert visitors._streams == {} and visitors._work == {}


def test_a_visit_may_ask_only_so_often_without_reading_the_answers() -> None:
    visitors = Visitors()
    assert all(visitors.may_ask("a") for _ in range(MOST_UNREAD))
    assert not visitors.may_ask("a") and visitors.may_ask("b")
    with visitors.streaming("a"):
        assert all(visitors.may_ask("a") for _ in range(2 * MOST_UNREAD))
    assert visitors.may_ask("a")
    for number in range(MOST_VISITS + 10):
        visitors.may_ask(f"other {number}")
    assert len(visitors._unread) == MOST_VISITS
