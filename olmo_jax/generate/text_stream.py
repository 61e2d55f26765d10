"""Ids to text as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows the beginning of a character


class TextStream:
    """The text of one sequence of ids.

    What all `add` and `end` return, joined, is the decoding of all ids, cut before the first stop
    string (of those that the same token completes, the one that begins first).
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        # Decoded again with each new id: those whose text is given out, which some decoders need
        # to know about a space before the next, and those after.
        self._given: list[int] = []
        self._new: list[int] = []
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, id: int) -> str:
        """The text that is certain now; "" after a stop string has come."""
        self._new.append(id)
        text = self._decoded()
        if text.endswith(_PARTIAL):
            return ""
        self._given, self._new = self._new, []
        return self._certain(text)

    def end(self) -> str:
        """What was held back."""
        text = self._certain(self._decoded()) if self._new else ""
        return text if self.stopped else text + self._held

    def _decoded(self) -> str:
        """The text of the new ids."""
        before = self._decode(self._given)
        return self._decode(self._given + self._new)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Letters at the text's end that begin `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
