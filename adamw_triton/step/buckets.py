"""Which parameters are stepped together while backward runs. Knows of no gradients but their sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Buckets:
    """Parameters in the order in which their gradients arrive. A *bucket* is what arrives one after another
    on a stream of a device until there are ``nbytes`` of gradients: learnt the first time, and kept, so that
    the launches of a bucket can be kept too. What then arrives in another order waits for its bucket, but
    never with more than two buckets' worth: beyond, all that is there is stepped as it is.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._members: list[set[int]] = []
        """Ids of parameters, by bucket."""
        self._bucket_of: dict[int, int] = {}
        self._waiting: dict[tuple[torch.device, int], dict[int, dict[int, Tensor]]] = defaultdict(dict)
        """What has arrived and is not stepped: by device and stream, for what is stepped on one cannot know
        whether gradients of another are there yet; and by bucket; those that have none yet under
        ``_UNKNOWN``."""

    def arrived(self, param: Tensor, stream: int = 0) -> list[list[Tensor]]:
        """What is to be stepped now, on this stream."""
        waiting = self._waiting[param.device, stream]
        number = self._bucket_of.get(id(param), _UNKNOWN)
        bucket = waiting.setdefault(number, {})
        bucket[id(param)] = param
        if sum(map(_nbytes, waiting.values())) > 2 * self._nbytes:
            return [self._take(waiting, each) for each in list(waiting)]
        is_learnt = number != _UNKNOWN
        full = bucket.keys() == self._members[number] if is_learnt else _nbytes(bucket) >= self._nbytes
        return [self._take(waiting, number)] if full else []

    def rest(self) -> list[list[Tensor]]:
        """What has arrived and waits, at the end of a step."""
        found = [self._take(waiting, each) for waiting in self._waiting.values() for each in list(waiting)]
        self._waiting.clear()
        return found

    def drop(self) -> None:
        """What has arrived and waits is not to be stepped, and will arrive again: or its bucket would be full
        too early."""
        self._waiting.clear()

    def _take(self, waiting: dict[int, dict[int, Tensor]], number: int) -> list[Tensor]:
        bucket = waiting.pop(number)
        if number == _UNKNOWN:
            self._bucket_of |= dict.fromkeys(bucket, len(self._members))
            self._members.append(set(bucket))
        return list(bucket.values())


def shared_out(params: Iterable[Tensor], nbytes: int) -> Iterator[list[Tensor]]:
    """Parameters in buckets of about so many bytes, in this order."""
    bucket: dict[int, Tensor] = {}
    for param in params:
        bucket[id(param)] = param
        if _nbytes(bucket) >= nbytes:
            yield list(bucket.values())
            bucket = {}
    if bucket:
        yield list(bucket.values())


_UNKNOWN = -1


def _nbytes(bucket: dict[int, Tensor]) -> int:
    return sum(param.nbytes for param in bucket.values())
