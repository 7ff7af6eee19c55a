"""Guesses at the next tokens, copied from what was said or drafted, and how many of them are worth it.

Where reading weights takes the time, a pass of the model over one token and k guesses costs little more than
over one token. The sampler then picks at each row as it always does; the first pick that is not the guess
ends the pass. So answers are those of one token at a time, drawn and penalised ones too. Guesses come from
the prompt, the answer so far, and the last few answers, which are often alike; or from a drafter, where there
is one and it promises more. Knows ids and times.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

MOST_DRAFT = 15  # with the token before them 16 rows, which the session never cuts
MOST_PLACES = 24  # earlier places that are compared, the last ones first
LONGEST_MATCH = 24  # tokens compared at a place
NOTICED_MATCHES = (2, 3, 4, 6, 9, 16)  # matches of at least so many tokens are counted apart
COST_SHARE = 0.01  # of decoding time, at most, is lost to wrong guesses, by measured times; noise adds to it
RECENT = 5  # passes of so many rows, whose median is what one takes: interrupted ones do not count
FADING = 0.97  # of counts, with each guess
SAVED_PASSES = 4  # credit for so many passes whose guesses are all wrong, with a drafter: it guesses always
FIRST_SLOPE = 0.1  # of a step's time, for each row more, until it is measured
PLAIN_EVERY = 64  # passes: how long one token takes has to be known
DRAFTED = len(NOTICED_MATCHES)  # guesses of a drafter are counted apart, all of them …
NOTICED_ODDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # … and by the probability that it gave them
KEPT_ANSWERS = 8
KEPT_TOKENS = 1024  # of an answer, its first ones


class Guess(Protocol):
    """Of a drafter."""

    @property
    def token(self) -> int: ...
    @property
    def probability(self) -> float: ...


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
        self._odds: list[float] = []  # of the last guesses, if a drafter made them
        self._asked: tuple[int, float] | None = None  # how many, and how long it took

    def guess(self, last: Sequence[int], most: int, drafter: Iterable[Guess] | None = None) -> list[int]:
        """At most `most` tokens that may follow the `last` picked ones.

        drafter: its guesses, made as they are asked for.
        """
        self._answer += last
        self._lookup.extend(last)
        self._match, place = self._lookup.find()
        self._odds, self._asked = [], None
        if drafter is None:
            count = self._drafts.pace.choose(self._match, most)
        else:
            count, drafted = self._drafts.pace.choose_between(self._match, most)
            if drafted:
                return self._ask(drafter, drafted)
        draft = self._lookup.after(place, count)
        ends = [at for at, token in enumerate(draft) if token in self._stops]
        return draft[: ends[0]] if ends else draft

    def learn(self, drafted: int, right: int, seconds: float) -> None:
        """Guessing and the pass took so long; the first `right` of the last guesses were right."""
        if self._asked is not None:
            self._drafts.pace.learn_drafted(self._odds, right, seconds, *self._asked)
        else:
            self._drafts.pace.learn(self._match, drafted, right, seconds)

    def _ask(self, drafter: Iterable[Guess], most: int) -> list[int]:
        """The drafter's guesses, until one is not worth its row."""
        start, asked = time.perf_counter(), 0
        draft: list[int] = []
        for guess in drafter:
            asked += 1
            if guess.token in self._stops or not self._drafts.pace.pays(self._odds, guess.probability):
                break
            draft.append(guess.token)
            self._odds.append(guess.probability)
            if asked == most:
                break
        self._asked = asked, time.perf_counter() - start
        return draft

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
    A drafter takes time besides, for each guess; the one that promises more tokens a second is asked. Its
    guesses are right as often as others of about the probability that it gives them: one that is not worth
    its row is left out, with all after it.

    Time lost, compared with one token at a time, stays under COST_SHARE: a pass needs credit for the case
    that every guess is wrong. COST_SHARE of all time is credited, and what right guesses save, but never more
    than one such pass, or a few with a drafter.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._times: list[deque[float]] = [deque(maxlen=RECENT) for _ in range(longest + 2)]  # by rows
        self._seconds = [0.0] * (longest + 2)  # their medians; 0: not measured
        self._estimate = [0.0] * (longest + 2)  # the same without gaps
        kinds = DRAFTED + 1 + len(NOTICED_ODDS)
        self._right = [1.0] * kinds  # older ones fade
        self._tried = [1.5] * kinds
        self._drafting: deque[float] = deque(maxlen=RECENT)  # seconds of one guess of a drafter
        self._credit_s = 0.0
        self._passes = -1  # with guesses, since one token was timed alone; -1: never

    def choose(self, match: int, most: int) -> int:
        """How many guesses to make after a match of `match` tokens, at most `most`."""
        most = min(most, self.longest)
        if not match or most < 1 or not 0 <= self._passes < PLAIN_EVERY:
            return 0
        self._estimate_all()
        _, count = self._best(_KIND[match], most)
        return self._affordable(count or self._tries_again)

    def choose_between(self, match: int, most: int) -> tuple[int, int]:
        """How many guesses to look up, and how many to ask a drafter for: one of them is 0."""
        most = min(most, self.longest)
        if most < 1 or not 0 <= self._passes < PLAIN_EVERY:
            return 0, 0
        self._estimate_all()
        speed, looked_up = self._best(_KIND[match], most) if match else (0.0, 0)
        each_s = self._drafting_s
        other, drafted = self._best(DRAFTED, most, each_s)
        if not looked_up and not drafted:
            looked_up = self._tries_again if match else 0
            drafted = 0 if looked_up else self._tries_again
        elif looked_up and speed >= other:
            drafted = 0
        else:
            looked_up = 0
        return self._affordable(looked_up), self._affordable(drafted, each_s)

    def pays(self, odds: Sequence[float], next_odds: float) -> bool:
        """Whether a drafter's next guess is worth a row in a pass with those before it."""
        chance, tokens = 1.0, 1.0
        for probability in odds:
            chance *= self._rate(_kind_of(probability))
            tokens += chance
        chance *= self._rate(_kind_of(next_odds))
        rows = len(odds) + 1
        with_it, without = self._estimate[rows + 1], self._estimate[rows]
        # With all credit at hand the first one is tried in any case: things may have changed.
        return (tokens + chance) * without >= tokens * with_it or (not odds and bool(self._tries_again))

    def learn(self, match: int, drafted: int, right: int, seconds: float) -> None:
        """A pass with `drafted` guesses, of which the first `right` were right, took so long."""
        self._learn([[_KIND[match]]] * drafted, right, seconds)

    def learn_drafted(
        self, odds: Sequence[float], right: int, seconds: float, asked: int, drafting_s: float
    ) -> None:
        """A drafter made `asked` guesses in `drafting_s` of the time; those of `odds` ran."""
        self._drafting.append(drafting_s / asked)
        kinds = [[DRAFTED, _kind_of(probability)] for probability in odds]
        self._learn(kinds, right, seconds - drafting_s, drafting_s)

    def _learn(self, kinds: Sequence[Sequence[int]], right: int, seconds: float, more_s: float = 0.0) -> None:
        drafted = len(kinds)
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
            for guess in range(min(right + 1, drafted)):
                for kind in kinds[guess]:
                    self._right[kind] = self._right[kind] * FADING + (guess < right)
                    self._tried[kind] = self._tried[kind] * FADING + 1
        most = self._most_credit_s
        self._credit_s = max(min(self._credit_s - more_s + COST_SHARE * seconds, most), -most)

    def _best(self, kind: int, most: int, each_s: float = 0.0) -> tuple[float, int]:
        """Tokens a second, and with how many guesses of this kind. each_s: what making one takes."""
        rate = self._rate(kind)
        best, chosen, chance, tokens = 1 / self._seconds[1], 0, 1.0, 1.0
        for count in range(1, most + 1):
            chance *= rate
            tokens += chance
            seconds = self._estimate[count + 1] + count * each_s
            if tokens > best * seconds:
                best, chosen = tokens / seconds, count
        return best, chosen

    def _affordable(self, count: int, each_s: float = 0.0) -> int:
        """As many as there is credit for."""
        while count and self._estimate[count + 1] + count * each_s - self._seconds[1] > self._credit_s:
            count -= 1
        return count

    def _rate(self, kind: int) -> float:
        return self._right[kind] / self._tried[kind]

    @property
    def _tries_again(self) -> int:
        """1 if there is credit for a whole pass: things may have changed."""
        return int(self._credit_s >= self._worst_s)

    @property
    def _drafting_s(self) -> float:
        times = sorted(self._drafting)
        return times[len(times) // 2] if times else FIRST_SLOPE * self._seconds[1]

    @property
    def _most_credit_s(self) -> float:
        return self._worst_s * (SAVED_PASSES if self._drafting else 1)

    @property
    def _worst_s(self) -> float:
        """What a pass with most guesses loses if all are wrong."""
        drafting_s = self.longest * self._drafting_s if self._drafting else 0.0
        return self._estimate[-1] + drafting_s - self._seconds[1]

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


def _kind_of(probability: float) -> int:
    """Where a drafter's guess of this probability is counted."""
    return DRAFTED + bisect.bisect_right(NOTICED_ODDS, probability)


# Length of a match -> which of NOTICED_MATCHES it belongs to.
_KIND = [sum(match >= least for least in NOTICED_MATCHES[1:]) for match in range(LONGEST_MATCH + 1)]
