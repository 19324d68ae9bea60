"""Places are handed out in the order of arrival, the queue is bounded, and nobody who leaves takes a place along."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from fastvlm_edge.server.admission import Admission, Place
from fastvlm_edge.server.errors import RequestError


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 20))


def test_places_in_the_order_of_arrival() -> None:
    async def main() -> None:
        admission = Admission(2, 3)
        first, second, third, fourth = (admission.enter() for _ in range(4))
        assert (first.granted, second.granted, third.granted, fourth.granted) == (True, True, False, False)
        assert (admission.running, admission.waiting) == (2, 2)
        second.leave()
        assert third.granted and not fourth.granted and await third.wait()
        for place in (first, third, fourth):
            place.leave()
            place.leave()
        assert (admission.running, admission.waiting) == (0, 0)

    run(main())


def test_a_full_queue_says_when_to_come_again() -> None:
    async def main() -> None:
        admission = Admission(1, 1)
        admission.enter()
        waiting = admission.enter()
        with pytest.raises(RequestError, match="1 replies are being generated and 1 requests wait") as caught:
            admission.enter()
        assert caught.value.status == 429 and caught.value.response.headers["retry-after"] == "1"
        waiting.leave()
        admission.enter()

    run(main())


def test_the_time_to_come_again_follows_from_what_requests_take() -> None:
    async def main() -> None:
        admission = Admission(2, 1)
        for _ in range(60):
            place = admission.enter()
            place.since -= 20  # as if it had begun then
            place.leave()
        assert admission.retry_after == 10

    run(main())


def test_a_request_of_several_replies_waits_for_all_of_them_and_is_not_overtaken() -> None:
    async def main() -> None:
        admission = Admission(3, 9)
        one, three, last = admission.enter(), admission.enter(3), admission.enter()
        assert not three.granted and not last.granted, "the smaller one behind it does not overtake"
        one.leave()
        assert three.granted and not last.granted
        three.leave()
        assert last.granted and admission.running == 1

    run(main())


def test_a_wait_has_an_end() -> None:
    async def main() -> None:
        admission = Admission(1, 1)
        admission.enter()
        waiting = admission.enter()
        assert not await waiting.wait(0.01)
        task = asyncio.create_task(waiting.wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        waiting.leave()
        assert (admission.running, admission.waiting) == (1, 0)

    run(main())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_books_agree(seed: int) -> None:
    async def main() -> None:
        chance, admission = random.Random(seed), Admission(3, 5)
        held: list[Place] = []
        for _ in range(300):
            if chance.random() < 0.5:
                try:
                    held.append(admission.enter(chance.choice((1, 1, 2, 3))))
                except RequestError:
                    assert admission.waiting == 5
            elif held:
                held.pop(chance.randrange(len(held))).leave()
            granted = [place.granted for place in held]
            assert admission.running == sum(place.count for place in held if place.granted) <= 3
            assert admission.waiting == granted.count(False) <= 5
            assert sorted(granted, reverse=True) == granted, "an older one waits"
        for place in held:
            place.leave()
        assert (admission.running, admission.waiting) == (0, 0)

    run(main())
