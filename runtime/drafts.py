"""Guesses at the next tokens, looked up or drafted, and how many of them are worth it.

Where reading weights takes the time, a pass of the model over one token and k guesses costs little more than
over one token. The sampler then picks at each row as it always does; the first pick that is not the guess
ends the pass. So answers are those of one token at a time, drawn and penalised ones too. Guesses are looked
up in the prompt and in what was answered before (`lookup`), or are a drafter's, where there is one and it
promises more. Knows ids and times.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from .lookup import Memory, Text

MOST_DRAFT = 15  # with the token before them 16 rows, which the session never cuts
LEAST_CHANCE = 0.05  # of a guess to come after the right ones before it: what is behind is not looked up
COST_SHARE = 0.01  # of decoding time, at most, is lost to wrong guesses, by measured times; noise adds to it
RECENT = 9  # passes of so many rows, whose median is what one takes: interrupted ones do not count
FADING = 0.97  # of counts, with each guess
SAVED_PASSES = 4  # credit for so many passes whose guesses are all wrong, with a drafter: it guesses always
FIRST_SLOPE = 0.1  # of a step's time, for each row more, until it is measured
LEAST_SLOPE = 0.04  # the same, whatever is measured: what looks free because times vary is not
OUTDATED = 128  # passes without one of so many rows, after which the oldest time of these is forgotten
DOUBT = 2  # passes of so many rows, from which on their own times say more than those of other passes
PLAIN_EVERY = 64  # passes: how long one token takes has to be known
DRAFTED = 0  # guesses of a drafter are counted, all of them …
NOTICED_ODDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # … and by the probability that it gave them


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
        self.memory = Memory()

    def begin(self, prompt_ids: Sequence[int], stops: Collection[int]) -> Guesser:
        """For an answer to this prompt. stops: tokens that end it, behind which nothing is guessed."""
        return Guesser(self, prompt_ids, stops)


class Guesser:
    """Of one answer."""

    def __init__(self, drafts: Drafts, prompt_ids: Sequence[int], stops: Collection[int]) -> None:
        self._pace, self._memory, self._stops = drafts.pace, drafts.memory, stops
        self._prompt = prompt_ids
        self._text: Text | None = None  # prompt and answer are read when they are guessed at, and at the end
        self._unread: list[int] = []
        self._reading_s = 0.0  # since the last pass
        self._odds: list[float] = []  # of the last guesses, if a drafter made them
        self._asked: tuple[int, float] | None = None  # how many, and how long it took

    def extend(self, tokens: Sequence[int]) -> None:
        """The answer goes on with these tokens."""
        self._unread += tokens

    @property
    def may_guess(self) -> bool:
        """Whether there can be a guess now. Costs next to nothing, so it is asked before every pass."""
        return self._pace.has_credit

    def guess(self, most: int, drafter: Iterable[Guess] | None = None) -> list[int]:
        """At most `most` tokens that may follow.

        drafter: its guesses, made as they are asked for.
        """
        draft: list[int] = []
        chances = self._look_up(draft)
        if drafter is None:
            return draft[: self._pace.choose(chances, most)]
        count, drafted = self._pace.choose_between(chances, most)
        return self._ask(drafter, drafted) if drafted else draft[:count]

    def learn(self, drafted: int, right: int, seconds: float) -> None:
        """Guessing and the pass took so long; the first `right` of the last guesses were right."""
        if self._reading_s:
            seconds -= self._reading_s
            self._pace.charge(self._reading_s)
            self._reading_s = 0.0
        if self._asked is not None:
            self._pace.learn_drafted(self._odds, right, seconds, *self._asked)
            self._odds, self._asked = [], None
        else:
            self._pace.learn(drafted, right, seconds)

    def end(self) -> None:
        """The answer is over."""
        self._read()
        self._pace.charge(self._reading_s)

    def _look_up(self, draft: list[int]) -> Iterator[float]:
        """How likely each of the guesses is that are put into `draft`, if those before it are right."""
        for token, chance in self._read().guesses():
            if token in self._stops:
                return
            draft.append(token)
            yield chance

    def _read(self) -> Text:
        start = time.perf_counter()
        if self._text is None:
            self._text = Text(self._memory, self._prompt)
        self._text.extend(self._unread)
        self._unread = []
        self._reading_s += time.perf_counter() - start
        return self._text

    def _ask(self, drafter: Iterable[Guess], most: int) -> list[int]:
        """The drafter's guesses, until one is not worth its row."""
        start, asked = time.perf_counter(), 0
        draft: list[int] = []
        for guess in drafter:
            asked += 1
            if guess.token in self._stops or not self._pace.pays(self._odds, guess.probability):
                break
            draft.append(guess.token)
            self._odds.append(guess.probability)
            if asked == most:
                break
        self._asked = asked, time.perf_counter() - start
        return draft


class Pace:
    """How many guesses to make, by what passes took and how many guesses were right.

    Guesses that are right with chances a, b, c … are expected to bring 1 + a + ab + abc + … tokens in the
    time of a pass of so many rows and one. The number of most tokens a second is taken. A drafter takes time
    besides, for each guess; the one that promises more tokens a second is asked. Its guesses are right as
    often as others of about the probability that it gives them: one that is not worth its row is left out,
    with all after it.

    Time lost, compared with one token at a time, stays under COST_SHARE: a pass needs credit for the case
    that every guess is wrong. COST_SHARE of all time is credited, and what right guesses save, but never more
    than one such pass, or a few with a drafter; reading what guesses are looked up in is taken from it.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._times: list[deque[float]] = [deque(maxlen=RECENT) for _ in range(longest + 2)]  # by rows
        self._idle = [0] * (longest + 2)  # passes since one of so many rows was timed, or forgotten
        self._seconds = [0.0] * (longest + 2)  # their medians; 0: not measured
        self._estimate = [0.0] * (longest + 2)  # the same without gaps; `_weigh` keeps it true
        self._weighed = False  # whether these two are of the latest times
        self._cheapest_s = 0.0  # what a wrong guess costs at least, as of the last time they were
        kinds = DRAFTED + 1 + len(NOTICED_ODDS)
        self._right = [1.0] * kinds  # older ones fade
        self._tried = [1.5] * kinds
        self._drafting: deque[float] = deque(maxlen=RECENT)  # seconds of one guess of a drafter
        self._credit_s = 0.0
        self._passes = -1  # with guesses, since one token was timed alone; -1: never

    @property
    def has_credit(self) -> bool:
        """For one guess at least, by what was known when this was last worked out."""
        return self._credit_s >= self._cheapest_s

    def choose(self, chances: Iterable[float], most: int) -> int:
        """How many guesses to make, at most `most`. chances: of each to be right after right ones."""
        most = self._affordable(most)
        if not most:
            return 0
        _, count, found = self._best(chances, most)
        return count or min(found, self._tries_again)

    def choose_between(self, chances: Iterable[float], most: int) -> tuple[int, int]:
        """How many guesses to look up, and how many to ask a drafter for: one of them is 0."""
        looked_up = drafted = found = 0
        speed = other = 0.0
        if affordable := self._affordable(most):
            speed, looked_up, found = self._best(chances, affordable)
        if affordable := self._affordable(most, self._drafting_s):
            rates = [self._rate(DRAFTED)] * affordable
            other, drafted, _ = self._best(rates, affordable, self._drafting_s)
        if not looked_up and not drafted:
            again = min(affordable, self._tries_again)
            return (again, 0) if found else (0, again)
        return (looked_up, 0) if looked_up and speed >= other else (0, drafted)

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

    def learn(self, drafted: int, right: int, seconds: float) -> None:
        """A pass with `drafted` guesses, of which the first `right` were right, took so long."""
        self._learn([()] * drafted, right, seconds)

    def learn_drafted(
        self, odds: Sequence[float], right: int, seconds: float, asked: int, drafting_s: float
    ) -> None:
        """A drafter made `asked` guesses in `drafting_s` of the time; those of `odds` ran."""
        self._drafting.append(drafting_s / asked)
        kinds = [[DRAFTED, _kind_of(probability)] for probability in odds]
        self._learn(kinds, right, seconds - drafting_s, drafting_s)

    def charge(self, seconds: float) -> None:
        """So much went into guessing beside passes. It makes no debts: guesses are to be tried again."""
        self._credit_s = max(self._credit_s - seconds, min(self._credit_s, 0.0))

    def _learn(self, kinds: Sequence[Sequence[int]], right: int, seconds: float, more_s: float = 0.0) -> None:
        drafted = len(kinds)
        self._times[drafted + 1].append(seconds)
        self._weighed = False
        self._credit_s += COST_SHARE * seconds - more_s
        if not drafted:
            if self._passes < 0:  # the first of all
                self._credit_s = seconds
            self._passes = 0
        else:
            self._passes += 1
            self._idle[drafted + 1] = 0
            self._forget()
            self._weigh()
            self._credit_s -= self._estimate[drafted + 1] - (right + 1) * self._seconds[1]
            for guess in range(min(right + 1, drafted)):
                for kind in kinds[guess]:
                    self._right[kind] = self._right[kind] * FADING + (guess < right)
                    self._tried[kind] = self._tried[kind] * FADING + 1
        if drafted or more_s:  # debts are limited too
            self._credit_s = max(self._credit_s, -self._most_credit_s)

    def _forget(self) -> None:
        """Times that may be untrue by now: while they keep guesses from being made, no others come."""
        for rows in range(2, len(self._times)):
            self._idle[rows] += 1
            if self._idle[rows] > OUTDATED and (times := self._times[rows]):
                times.popleft()
                self._idle[rows] = 0

    def _best(self, chances: Iterable[float], most: int, each_s: float = 0.0) -> tuple[float, int, int]:
        """(tokens a second, with how many guesses, how many there are). each_s: what making one takes."""
        best, chosen, count, chance, tokens = 1 / self._seconds[1], 0, 0, 1.0, 1.0
        for count, right in zip(range(1, most + 1), chances, strict=False):
            chance *= right
            tokens += chance
            seconds = self._estimate[count + 1] + count * each_s
            if tokens > best * seconds:
                best, chosen = tokens / seconds, count
            if chance < LEAST_CHANCE:
                break
        return best, chosen, count

    def _affordable(self, most: int, each_s: float = 0.0) -> int:
        """As many guesses as there is credit for; none until one token was timed."""
        self._weigh()
        count = min(most, self.longest) if 0 <= self._passes < PLAIN_EVERY else 0
        while count > 0 and self._estimate[count + 1] + count * each_s - self._seconds[1] > self._credit_s:
            count -= 1
        return max(count, 0)

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

    def _weigh(self) -> None:
        """What passes take, from the latest times; credit for no more than one, or a few, can lose."""
        if not self._weighed:
            for rows, times in enumerate(self._times):
                self._seconds[rows] = sorted(times)[len(times) // 2] if times else 0.0
            self._estimate_all()
            self._cheapest_s = self._estimate[2] - self._seconds[1]
            self._weighed = True
        self._credit_s = min(self._credit_s, self._most_credit_s)

    def _estimate_all(self) -> None:
        """Between what passes of so many rows took, and what another row usually takes.

        Of the longest passes there are few, and one that was interrupted would rule them out for good.
        """
        one = self._seconds[1]
        slopes = []
        for rows in range(2, len(self._times)):
            if times := self._times[rows]:
                slopes.append(((self._seconds[rows] - one) / (rows - 1), len(times)))
        slope = _median(slopes or [(FIRST_SLOPE * one, 1)])
        self._estimate[1] = one
        for rows in range(2, len(self._times)):
            usual, own = one + slope * (rows - 1), len(self._times[rows])
            between = (own * self._seconds[rows] + DOUBT * usual) / (own + DOUBT)
            self._estimate[rows] = max(between, self._estimate[rows - 1] + LEAST_SLOPE * one)


def _median(weighted: Sequence[tuple[float, int]]) -> float:
    """Of (value, weight)."""
    half, so_far = sum(weight for _, weight in weighted) / 2, 0
    for value, weight in sorted(weighted):
        so_far += weight
        if so_far >= half:
            return value
    raise ValueError("no values")


def _kind_of(probability: float) -> int:
    """Where a drafter's guess of this probability is counted."""
    return DRAFTED + bisect.bisect_right(NOTICED_ODDS, probability)
