"""Guesses at the next tokens, copied from what was said, and how many of them are worth it.

Where reading weights takes the time, a pass of the model over one token and k guesses costs little more than
over one token. The sampler then picks at each row as it always does; the first pick that is not the guess
ends the pass. So answers are those of one token at a time, drawn and penalised ones too. Guesses come from
the prompt, the answer so far, and the last few answers, which are often alike. Knows ids and times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

MOST_DRAFT = 15  # with the token before them 16 rows, which the session never cuts
MOST_PLACES = 24  # earlier places that are compared, the last ones first
LONGEST_MATCH = 24  # tokens compared at a place
NOTICED_MATCHES = (2, 3, 4, 6, 9, 16)  # matches of at least so many tokens are counted apart
COST_SHARE = 0.01  # of decoding time, at most, is lost to wrong guesses, by measured times; noise adds to it
RECENT = 5  # passes of so many rows, whose median is what one takes: interrupted ones do not count
FADING = 0.97  # of counts, with each guess
FIRST_SLOPE = 0.1  # of a step's time, for each row more, until it is measured
PLAIN_EVERY = 64  # passes: how long one token takes has to be known
KEPT_ANSWERS = 8
KEPT_TOKENS = 1024  # of an answer, its first ones


class Drafts:
    """Of one engine: what one answer taught serves the next."""

    def __init__(self, longest: int) -> None:
        self.pace = Pace(longest)
        self.answers: deque[list[int]] = deque(maxlen=KEPT_ANSWERS)

    def begin(self, prompt_ids: Sequence[int], stops: Collection[int]) -> Guesser:
        """For an answer to this prompt. stops: tokens that end it, behind which nothing is guessed."""
        return Guesser(self, prompt_ids, stops)


class Guesser:
    """Of one answer."""

    def __init__(self, drafts: Drafts, prompt_ids: Sequence[int], stops: Collection[int]) -> None:
        self._drafts, self._stops = drafts, stops
        self._lookup = Lookup([token for answer in drafts.answers for token in answer])
        self._lookup.extend(prompt_ids)
        self._answer: list[int] = []
        self._match = 0

    def guess(self, last: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow the `last` picked ones."""
        self._answer += last
        self._lookup.extend(last)
        self._match, place = self._lookup.find()
        count = self._drafts.pace.choose(self._match, most)
        draft = self._lookup.after(place, count)
        ends = [at for at, token in enumerate(draft) if token in self._stops]
        return draft[: ends[0]] if ends else draft

    def learn(self, drafted: int, right: int, seconds: float) -> None:
        """The pass over the last guesses took so long; the first `right` of them were right."""
        self._drafts.pace.learn(self._match, drafted, right, seconds)

    def end(self, last: Sequence[int]) -> None:
        """The answer is over, with these tokens behind those that were guessed after."""
        self._drafts.answers.append([*self._answer, *last][:KEPT_TOKENS])


class Lookup:
    """Where the last tokens stood before: the longest match, of those the latest."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._last: dict[int, int] = {}  # two tokens -> where the second last stood
        self._before: list[int] = []  # place -> the place before it with the same two tokens, or -1
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        previous = self._ids[-1] if self._ids else -1
        for token in ids:
            place = len(self._ids)
            pair = previous << 32 | token
            self._before.append(self._last.get(pair, -1) if place else -1)
            self._last[pair] = place
            self._ids.append(token)
            previous = token

    def find(self) -> tuple[int, int]:
        """(length of the match, place of the token that followed it); length 0: nothing matches."""
        ids, best, follows = self._ids, 0, 0
        end = len(ids) - 1
        place = self._before[end] if ids else -1
        for _ in range(MOST_PLACES):
            if place < 0:
                break
            length = 2
            while length < LONGEST_MATCH and length <= place and ids[place - length] == ids[end - length]:
                length += 1
            if length > best:
                best, follows = length, place + 1
            if best == LONGEST_MATCH:
                break
            place = self._before[place]
        return best, follows

    def after(self, place: int, count: int) -> list[int]:
        """What stood from `place` on; a repetition goes on repeating."""
        ids, size = self._ids, len(self._ids)
        drafted: list[int] = []
        for at in range(place, place + count):
            drafted.append(ids[at] if at < size else drafted[at - size])
        return drafted


class Pace:
    """How many guesses to make, by what passes took and how many guesses were right.

    Guesses after matches of about one length are right about equally often, r each: k of them are expected to
    bring 1 + r + … + r^k tokens in the time of a pass of k + 1 rows. The k of most tokens a second is taken.
    Time lost, compared with one token at a time, stays under COST_SHARE: a pass needs credit for the case
    that every guess is wrong. COST_SHARE of all time is credited, and what right guesses save, but never more
    than one such pass.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._times: list[deque[float]] = [deque(maxlen=RECENT) for _ in range(longest + 2)]  # by rows
        self._seconds = [0.0] * (longest + 2)  # their medians; 0: not measured
        self._estimate = [0.0] * (longest + 2)  # the same without gaps
        self._right = [1.0] * len(NOTICED_MATCHES)  # older ones fade
        self._tried = [1.5] * len(NOTICED_MATCHES)
        self._credit_s = 0.0
        self._passes = -1  # with guesses, since one token was timed alone; -1: never

    def choose(self, match: int, most: int) -> int:
        """How many guesses to make after a match of `match` tokens, at most `most`."""
        most = min(most, self.longest)
        if not match or most < 1 or not 0 <= self._passes < PLAIN_EVERY:
            return 0
        self._estimate_all()
        one = self._seconds[1]
        rate = self._right[_KIND[match]] / self._tried[_KIND[match]]
        best, chosen, chance, tokens = 1 / one, 0, 1.0, 1.0
        for count in range(1, most + 1):
            chance *= rate
            tokens += chance
            if tokens > best * self._estimate[count + 1]:
                best, chosen = tokens / self._estimate[count + 1], count
        if not chosen and self._credit_s >= self._most_credit_s:
            chosen = 1  # things may have changed
        while chosen and self._estimate[chosen + 1] - one > self._credit_s:
            chosen -= 1
        return chosen

    def learn(self, match: int, drafted: int, right: int, seconds: float) -> None:
        """A pass with `drafted` guesses, of which the first `right` were right, took so long."""
        times = self._times[drafted + 1]
        times.append(seconds)
        seconds = self._seconds[drafted + 1] = sorted(times)[len(times) // 2]
        if not drafted:
            if self._passes < 0:  # the first of all
                self._credit_s = seconds
                self._estimate_all()
            self._passes = 0
        else:
            self._passes += 1
            self._credit_s -= seconds - (right + 1) * self._seconds[1]
            kind = _KIND[match]
            for guess in range(min(right + 1, drafted)):
                self._right[kind] = self._right[kind] * FADING + (guess < right)
                self._tried[kind] = self._tried[kind] * FADING + 1
        most = self._most_credit_s
        self._credit_s = max(min(self._credit_s + COST_SHARE * seconds, most), -most)

    @property
    def _most_credit_s(self) -> float:
        return self._estimate[-1] - self._seconds[1]

    def _estimate_all(self) -> None:
        """A line between two measured numbers of rows; beyond the last, what a row took on average."""
        one = self._seconds[1]
        rows, spent, slope = 1, one, FIRST_SLOPE * one
        for count, seconds in enumerate(self._seconds):
            if not seconds or not count:
                continue
            if count > rows:
                slope = max((seconds - one) / (count - 1), 0.0)
                for between in range(rows + 1, count):
                    self._estimate[between] = spent + (seconds - spent) * (between - rows) / (count - rows)
            self._estimate[count] = seconds
            rows, spent = count, seconds
        for beyond in range(rows + 1, len(self._estimate)):
            self._estimate[beyond] = spent + slope * (beyond - rows)


# Length of a match -> which of NOTICED_MATCHES it belongs to.
_KIND = [sum(match >= least for least in NOTICED_MATCHES[1:]) for match in range(LONGEST_MATCH + 1)]
