"""Which replica gets a request: shared prefixes, the bound on load, and what is remembered."""

import random
from collections.abc import Sequence, ValuesView

import numpy as np

from minisgl.prefix_routing import HEADROOM, PrefixRouter

BLOCK = 4


def prompt(*parts: Sequence[int]) -> bytes:
    return np.concatenate([np.array(part, np.int32) for part in parts]).tobytes()


def tokens(name: int, blocks: int) -> list[int]:
    return [1000 * name + place for place in range(blocks * BLOCK)]


def test_a_shared_prefix_goes_where_it_is_and_others_to_the_least_loaded() -> None:
    router = PrefixRouter(BLOCK)
    assert router.choose(prompt(tokens(1, 3)), {"a": 1.0, "b": 0.0, "c": 2.0}) == "b"
    busier = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert router.choose(prompt(tokens(1, 2), tokens(2, 5)), busier) == "b"
    assert router.choose(prompt(tokens(3, 3)), busier) == "a"
    assert router.choose(prompt(tokens(1, 1)[:-1]), busier) == "a"  # not a whole block of it


def test_the_longest_prefix_wins_over_a_shorter_one_and_over_less_load() -> None:
    router = PrefixRouter(BLOCK)
    router.choose(prompt(tokens(1, 2)), {"a": 0.0})
    router.choose(prompt(tokens(1, 4)), {"a": 99.0, "b": 0.0})
    assert router.choose(prompt(tokens(1, 6)), {"a": 0.0, "b": 2.0}) == "b"
    assert router.choose(prompt(tokens(1, 2), tokens(2, 1)), {"a": 0.0, "b": 2.0}) == "a"


def test_the_same_block_behind_another_prefix_is_another() -> None:
    router = PrefixRouter(BLOCK)
    router.choose(prompt(tokens(1, 1), tokens(2, 1)), {"a": 0.0})
    assert router.choose(prompt(tokens(2, 1)), {"a": 1.0, "b": 0.0}) == "b"


def test_over_the_bound_a_shorter_prefix_is_next_and_then_the_least_loaded() -> None:
    router = PrefixRouter(BLOCK, slack=0.5)
    router.choose(prompt(tokens(1, 2)), {"short": 0.0})
    router.choose(prompt(tokens(1, 4)), {"short": 99.0, "long": 0.0})
    # the mean is x / 4, and x is at the limit of 1.5 means and HEADROOM
    limit = HEADROOM / (1 - 1.5 / 4)
    loads = {"idle": 0.0, "long": limit, "short": 0.0, "other": 0.0}
    assert router.choose(prompt(tokens(1, 4)), loads) == "long"
    loads["long"] += 0.1
    assert router.choose(prompt(tokens(1, 4)), loads) == "short"
    crowded = {"idle": 1.0, "long": 40.0, "short": 40.0, "other": 2.0}
    assert router.choose(prompt(tokens(1, 4)), crowded) == "idle"
    # which has it, too, from now on
    assert router.choose(prompt(tokens(1, 4)), {"idle": 2.0, "long": 40.0, "short": 40.0, "other": 1.0}) == "idle"


def test_an_idle_fleet_is_used_in_turns() -> None:
    router = PrefixRouter(BLOCK)
    loads = dict.fromkeys("abc", 0.0)
    assert {router.choose(prompt(tokens(name, 1)), loads) for name in range(3)} == set("abc")


def test_a_replica_that_is_gone_gets_nothing_and_is_not_kept() -> None:
    router = PrefixRouter(BLOCK)
    router.choose(prompt(tokens(1, 4)), {"a": 0.0})
    router.choose(prompt(tokens(1, 2), tokens(2, 2)), {"a": 99.0, "b": 0.0})
    loads = {"b": 1.0, "c": 0.0}
    assert router.choose(prompt(tokens(2, 1)), loads) == "c"
    assert router.choose(prompt(tokens(1, 4)), loads) == "b"  # which has its first half
    for number in range(50):
        router.choose(prompt(tokens(1, 4)), {number: 0.0})
    assert set(router._holders.values()) >= {(49,)}
    assert max(map(len, router._holders.values())) <= 2


def test_the_least_recently_used_prefixes_are_dropped_ends_first() -> None:
    router = PrefixRouter(BLOCK, max_blocks=6)
    router.choose(prompt(tokens(1, 4)), {"a": 0.0})
    router.choose(prompt(tokens(2, 4)), {"b": 0.0})  # two blocks of the first remain
    router.choose(prompt(tokens(1, 1)), {"a": 0.0})
    router.choose(prompt(tokens(3, 2)), {"c": 0.0})  # and now one, used again, and three of the second
    loads = {"a": 2.0, "b": 2.0, "c": 2.0, "d": 0.0}
    assert router.choose(prompt(tokens(1, 1)), loads) == "a"
    assert router.choose(prompt(tokens(2, 1)), loads) == "b"
    assert router.choose(prompt(tokens(3, 1)), loads) == "c"
    long = prompt(tokens(4, 50))
    router.choose(long, {"d": 0.0})
    assert len(router._holders) == 6
    assert router.choose(long, loads | {"d": 3.0}) == "d"
    assert router.choose(prompt(tokens(1, 1)), {"a": 1.0, "d": 0.0}) == "d"  # nothing of it is known


def test_random_prompts_go_to_known_replicas_the_same_each_time() -> None:
    def play() -> list[int]:
        router, rng = PrefixRouter(BLOCK, max_blocks=200), random.Random(0)
        replicas, chosen = list(range(12)), []
        for _ in range(2000):
            loads = {replica: float(rng.randrange(9)) for replica in rng.sample(replicas, rng.randint(1, 12))}
            text = [tokens(rng.randrange(5), rng.randint(0, 3)) for _ in range(rng.randint(0, 4))]
            chosen.append(router.choose(prompt([], *text), loads))
            assert chosen[-1] in loads
            assert len(router._holders) <= 200
            assert all(router._holders.values())
        return chosen

    assert play() == play()


def test_every_prefix_keeps_to_one_replica_while_loads_are_even() -> None:
    router, loads = PrefixRouter(BLOCK), dict.fromkeys(range(10), 5.0)
    home = {name: router.choose(prompt(tokens(name, 4)), loads) for name in range(40)}
    assert sorted(home.values()) == sorted([*range(10)] * 4)
    for name in range(40):
        assert router.choose(prompt(tokens(name, 4), tokens(99 + name, 9)), loads) == home[name]


def test_loads_are_summed_only_for_a_known_prefix() -> None:
    class Loads(dict[str, float]):
        summed = False

        def values(self) -> ValuesView[float]:  # type: ignore[override]
            self.summed = True
            return dict(self).values()

    router, loads = PrefixRouter(BLOCK), Loads(a=0.0, b=1.0)
    assert (router.choose(prompt(tokens(1, 2)), loads), loads.summed) == ("a", False)
    assert (router.choose(prompt(tokens(1, 1), tokens(2, 1)), loads), loads.summed) == ("a", True)
