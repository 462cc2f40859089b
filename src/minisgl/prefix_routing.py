"""Which replica gets a request: the one that was sent most of its prompt before, unless that one is too busy."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, TypeVar

Replica = TypeVar("Replica", bound=Hashable)
HEADROOM: Final = 2.0  # requests over the bound, so that a prefix keeps its replica while there are few requests


class PrefixRouter:
    """Remembers which replicas were sent which prefixes, in whole blocks of `block` tokens, the last `max_blocks`.

    The replica that was sent the longest prefix of a prompt gets it, unless its load is over `1 + slack` times the mean
    and HEADROOM (as in "Consistent Hashing with Bounded Loads", Mirrokni et al., 2018); then one that was sent a
    shorter prefix, and in the end any. Among equals the least loaded is taken. Not thread-safe.
    """

    def __init__(self, block: int = 64, max_blocks: int = 1 << 18, slack: float = 0.25) -> None:
        self.block_bytes = block * 4
        self.max_blocks = max_blocks
        self.slack = slack
        # By a hash of the whole prefix, the least recently used first. Who was sent a block was sent all before it.
        # Blocks share their tuples: most were sent to a single replica.
        self._holders: OrderedDict[int, tuple[Any, ...]] = OrderedDict()
        self._choices = 0

    def choose(self, prompt: bytes, loads: Mapping[Replica, float]) -> Replica:
        """A replica among `loads`, which are in requests, for the int32 token ids `prompt`; it counts as sent there."""
        size, key = self.block_bytes, 0
        keys: list[int] = []
        for end in range(size, len(prompt) + 1, size):
            key = hash((key, prompt[end - size : end]))  # equal by chance: a worse choice, and no more
            keys.append(key)
        replica = self._choose(keys, loads)
        self._remember(keys, replica, loads)
        return replica

    def _choose(self, keys: Sequence[int], loads: Mapping[Replica, float]) -> Replica:
        prefixes: list[tuple[Any, ...]] = []
        for key in keys:
            if (holders := self._holders.get(key)) is None:
                break
            if not prefixes or holders is not prefixes[-1]:
                prefixes.append(holders)
        limit = (1 + self.slack) * sum(loads.values()) / len(loads) + HEADROOM if prefixes else 0.0
        for holders in reversed(prefixes):
            found: list[Replica] = [replica for replica in holders if replica in loads and loads[replica] <= limit]
            if found:
                return self._least_loaded(found, loads)
        return self._least_loaded(list(loads), loads)

    def _least_loaded(self, replicas: Sequence[Replica], loads: Mapping[Replica, float]) -> Replica:
        """One after the other where several are, so that an idle fleet uses all its caches."""
        if len(replicas) == 1:
            return replicas[0]
        least = min(loads[replica] for replica in replicas)
        equal = [replica for replica in replicas if loads[replica] == least]
        self._choices += 1
        return equal[self._choices % len(equal)]

    def _remember(self, keys: Sequence[int], replica: Replica, loads: Mapping[Replica, float]) -> None:
        known, alone = self._holders, (replica,)
        before, after = alone, alone
        for key in reversed(keys):  # so that the ends of prefixes are dropped first
            holders = known.get(key, alone)
            if holders is not before:
                before = after = holders
                if replica not in holders:  # and no longer those that are gone
                    after = (*(other for other in holders if other in loads), replica)
            known[key] = after
            known.move_to_end(key)
        while len(known) > self.max_blocks:
            known.popitem(last=False)
