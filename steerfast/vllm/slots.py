"""Who holds which slot: one count in the scheduler, which admits requests, and one beside every bank, which fills slots.

Both see the same requests come and go in the same order and hold at most as many slots, so what the scheduler admits
always fits. Plans are told apart by their content: two names of one content share its slots. A strength is no part of a
plan and takes no slot.
"""

from __future__ import annotations

from collections.abc import Iterable

from .plans import ServedPlan


class Admission:
    """The scheduler's side: which requests may run with the slots there are. First come, first served.

    Args:
        slots: How many slots every bank has.
    """

    def __init__(self, slots: int) -> None:
        self.free = slots
        self._holders: dict[str, int] = {}  # fingerprint -> requests that hold it
        self._requests: dict[str, tuple[ServedPlan, ...]] = {}
        self._waiting: dict[str, int] = {}  # in order of arrival, with the number of changes when last refused
        self._changes = 0

    @property
    def waiting(self) -> int:
        """Requests that have been held back and still are."""
        return len(self._waiting)

    @property
    def requests(self) -> int:
        """Requests that hold slots."""
        return len(self._requests)

    def admit(self, request: str, plans: Iterable[ServedPlan]) -> bool:
        """Whether the request may run; then it holds its plans until `release`. Asking again changes nothing."""
        if request in self._requests:
            return True
        if self._waiting.get(request) == self._changes:
            return False  # asked again in every step
        wanted = {served.fingerprint: served for served in plans}
        need = sum(served.slots for content, served in wanted.items() if content not in self._holders)
        first = next(iter(self._waiting), request)
        if need > self.free or (need and first != request):
            self._waiting[request] = self._changes
            return False
        self._waiting.pop(request, None)
        self._changes += 1
        self.free -= need
        for content in wanted:
            self._holders[content] = self._holders.get(content, 0) + 1
        self._requests[request] = tuple(wanted.values())
        return True

    def release(self, request: str) -> None:
        """The request has ended, or was aborted while it waited."""
        self._waiting.pop(request, None)
        self._changes += 1
        for served in self._requests.pop(request, ()):
            self._holders[served.fingerprint] -= 1
            if not self._holders[served.fingerprint]:
                del self._holders[served.fingerprint]
                self.free += served.slots


class Residents:
    """The bank's side: slot numbers of the plans that are loaded; one without a request makes room when needed.

    Args:
        slots: How many slots every bank has.
    """

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))
        self._numbers: dict[str, tuple[int, ...]] = {}  # fingerprint -> slots, the longest unused first
        self._holders: dict[str, int] = {}

    def hold(self, served: ServedPlan) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """(slot numbers, slots to empty first, whether the plan must be loaded into its slots)."""
        content = served.fingerprint
        self._holders[content] = self._holders.get(content, 0) + 1
        if content in self._numbers:
            numbers = self._numbers.pop(content)
            self._numbers[content] = numbers
            return numbers, (), False
        emptied: list[int] = []
        for other in [other for other in self._numbers if other not in self._holders]:
            if len(self._free) >= served.slots:
                break
            numbers = self._numbers.pop(other)
            emptied += numbers
            self._free += numbers
        if len(self._free) < served.slots:
            raise RuntimeError(
                f"steerfast: no slot is free for the plan {served.name!r}; the scheduler admitted too much"
            )
        self._free.sort()
        numbers = tuple(self._free[: served.slots])
        del self._free[: served.slots]
        self._numbers[content] = numbers
        return numbers, tuple(emptied), True

    def release(self, served: ServedPlan) -> None:
        """Give up one reference; the plan stays loaded until its slots are needed."""
        self._holders[served.fingerprint] -= 1
        if not self._holders[served.fingerprint]:
            del self._holders[served.fingerprint]

    @property
    def held(self) -> int:
        """Plans that a request holds."""
        return len(self._holders)
