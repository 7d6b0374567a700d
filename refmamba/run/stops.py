"""Stop strings: a text that comes in pieces ends before the first of them."""

from collections.abc import Sequence


class Stops:
    """Lets a text through piece by piece, up to the first stop string; what may be the start of a stop string is held back.

    The first is the one that ends first, and of two that end together the one that begins first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.reached = False

    def put(self, piece: str) -> str:
        """The text that this piece completes, and no later one can turn into a stop string."""
        passed = ""
        for character in piece:
            self._held += character
            ended = [stop for stop in self._stops if self._held.endswith(stop)]
            if ended:
                self.reached = True
                passed += self._held.removesuffix(max(ended, key=len))
                self._held = ""
                break
            while not any(stop.startswith(self._held) for stop in self._stops) and self._held:
                passed, self._held = passed + self._held[0], self._held[1:]
        return passed

    def flush(self) -> str:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        return held
