"""Reuse of what was run before: the same tokens as without, from exactly the position that is still right."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from gemma_edge.runtime.bundle import Caches, LayerCache
from gemma_edge.runtime.cache import KvCaches
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.prefix import ReuseSettings, default_budget_bytes
from gemma_edge.runtime.prompt import NOW, Part, Soft
from gemma_edge.runtime.sampler import SamplingParams

from .support.cancelling import SetAfter
from .support.tiny_audio import TINY
from .support.tiny_bundles import TinyBundle

WINDOW, CHUNK, CONTEXT = 8, 16, 192
MARK = 500  # stands where a system turn ends
PLENTY = 1 << 24


def boundary(keys: Sequence[int]) -> int | None:
    return keys.index(MARK) + 1 if MARK in keys else None


def settings(budget_bytes: int = PLENTY, **options) -> ReuseSettings:
    return ReuseSettings(budget_bytes, boundary=boundary, **(dict(least_tokens=4) | options))


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(23, MARK, length).tolist()


def endless(engine: Engine) -> Engine:
    """No id stops it."""
    engine.eos = frozenset()
    return engine


def answer(engine: Engine, prompt: list[int], new_tokens: int = 12) -> list[int]:
    return list(engine.generate(prompt, max_new_tokens=new_tokens))


def reused(engine: Engine) -> int:
    assert engine.last_stats is not None
    return engine.last_stats.reused_tokens


@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("slack", [0, 1, 4, 30])
def test_what_a_window_still_holds(window: int, slack: int):
    """Against the operator's rule, played out: it drops slack + 1 tokens whenever it is full."""
    sliding = LayerCache(0, "sliding_attention", 1, window + slack, 4)
    caches = KvCaches(Caches(90, "float32", (sliding,), 0), window=window)
    first, firsts = 0, [0]
    for length in range(1, 91):
        if length - first > window + slack:
            first += slack + 1
        firsts.append(first)
    assert [caches.begin(length) for length in range(91)] == firsts
    for length in range(91):
        for wanted in range(91):
            there = length if wanted >= length else wanted if firsts[wanted] == firsts[length] else 0
            assert caches.back(length, wanted) == there
        assert caches.ahead(length) == sum(1 for later in firsts[length + 1 :] if later == firsts[length])


@pytest.mark.parametrize(
    ("device", "chunk"),
    [
        ({}, 16),
        ({}, 5),
        (dict(slack=0), 16),
        (dict(slack=1, kv="float16"), 3),
        (dict(slack=13, kv="int8"), 16),
    ],
    ids=["4 above", "short chunks", "none above", "float16", "int8"],
)
def test_the_same_tokens_with_and_without(tiny_bundle, device: dict, chunk: int):
    """Prompts that begin as earlier ones did, or their answers: with all of them, nearly all, or a part."""
    tiny = tiny_bundle(context=CONTEXT, chunk=CHUNK, **device)
    kv = device.get("kv", "float32")
    plain, fast = endless(Engine(tiny.bundle)), open_engine(tiny, 100_000)
    plain._session.chunk = fast._session.chunk = chunk
    drawn = random.Random(chunk)
    system = [*ids_of(40, seed=1), MARK]
    seen = [system, [*ids_of(7, seed=2), MARK], ids_of(60, seed=3)]
    total = differing = 0
    for turn in range(30):
        base = seen[-1] if turn % 3 else drawn.choice(seen)
        kept = drawn.choice([len(base), len(base) - drawn.randrange(3), drawn.randrange(1, len(base) + 1)])
        prompt = base[: min(max(kept, 1), 150)] + ids_of(drawn.randrange(0, 25), seed=turn + 10)
        tokens = answer(fast, prompt, 10)
        total += reused(fast)
        if tokens == answer(plain, prompt, 10):
            # Rounded caches: where chunks begin moves logits by 0.07, with and without reuse.
            bound = 0.01 if kv == "float32" else 0.2
            assert np.abs(fast._session.logits - plain._session.logits).max() < bound
        else:
            differing += 1
            assert kv == "float16", f"turn {turn}: {reused(fast)} of {len(prompt)} reused"
        seen.append(prompt + tokens)
    assert total > 400 and differing <= 5
    assert fast._reuse.snapshots.size_bytes <= 100_000


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def plain(tiny: TinyBundle) -> Engine:
    return endless(Engine(tiny.bundle))


def open_engine(tiny: TinyBundle, budget_bytes: int = PLENTY, **options) -> Engine:
    return endless(Engine(tiny.bundle, reuse=settings(budget_bytes, **options)))


def test_a_second_turn_pays_for_its_new_tokens_only(tiny: TinyBundle, plain: Engine):
    engine = open_engine(tiny)
    first = ids_of(100)
    told = answer(engine, first)
    assert reused(engine) == 0
    second = [*first, *told, *ids_of(9, seed=4)]
    assert answer(engine, second) == answer(plain, second)
    assert reused(engine) == len(first) + len(told) - 1  # the last token of an answer was never run
    assert engine.last_stats.prompt_tokens == len(second)


def test_the_caches_alone_serve_without_a_budget(tiny: TinyBundle):
    engine = open_engine(tiny, 0)
    prompt = ids_of(100)
    told = answer(engine, prompt)
    answer(engine, [*prompt, *told, 77])
    assert reused(engine) == len(prompt) + len(told) - 1
    answer(engine, ids_of(100, seed=3))
    answer(engine, [*prompt, *told, 77])
    assert reused(engine) == 0


def test_other_words_after_the_same_system_turn(tiny: TinyBundle, plain: Engine):
    engine = open_engine(tiny)
    system = [*ids_of(60), MARK]
    for seed, before in ((1, 0), (2, len(system)), (3, len(system))):
        prompt = system + ids_of(40, seed=seed)
        assert answer(engine, prompt) == answer(plain, prompt)
        assert reused(engine) == before


def test_interleaved_conversations_are_both_kept(tiny: TinyBundle, plain: Engine):
    engine = open_engine(tiny)
    talks = [ids_of(50, seed=1), ids_of(70, seed=2)]
    for turn in range(3):
        for number, talk in enumerate(talks):
            before = len(talk) - 1 if turn else 0
            talk += ids_of(5, seed=10 * turn + number)
            told = answer(engine, talk)
            assert told == answer(plain, talk)
            assert reused(engine) == (before if turn else 0)
            talk += told
    kept = list(engine._reuse.snapshots)
    assert len(kept) == 2  # a later state takes the place of an earlier one; the last is in the caches
    assert {one.kind for one in kept} == {"conversation"}


def test_a_retry_of_the_same_prompt_runs_its_last_token(tiny: TinyBundle):
    engine = open_engine(tiny)
    prompt = ids_of(6)
    told = answer(engine, prompt, 3)
    assert answer(engine, prompt, 3) == told  # all within the window: it can be taken back
    assert reused(engine) == len(prompt) - 1


def test_a_small_budget_keeps_what_fits_and_system_turns_first(tiny: TinyBundle):
    probe = open_engine(tiny)
    one = probe._session.caches.size_bytes(61)
    engine = open_engine(tiny, one + 100)
    system = [*ids_of(60), MARK]
    for seed in range(4):  # the conversations do not fit beside it, and do not take its place
        answer(engine, system + ids_of(40, seed=seed))
        assert reused(engine) == (len(system) if seed else 0)
    other = [*ids_of(60, seed=9), MARK]
    answer(engine, [*other, 30])
    answer(engine, ids_of(40, seed=5))
    answer(engine, [*system, 31])
    assert reused(engine) == 0  # the other one took its place, being the last one used
    assert engine._reuse.snapshots.size_bytes <= one + 100


def test_a_pinned_prefix_stays(tiny: TinyBundle, plain: Engine):
    probe = open_engine(tiny)
    engine = open_engine(tiny, probe._session.caches.size_bytes(61) + 100)
    pinned = [*ids_of(60), MARK]
    engine.remember(pinned, "greenhouse")
    for seed in range(3):
        answer(engine, [*ids_of(58, seed=seed + 20), MARK, 40])
    prompt = [*pinned, *ids_of(20, seed=3)]
    assert answer(engine, prompt) == answer(plain, prompt)
    assert reused(engine) == len(pinned)
    with pytest.raises(RequestError, match=r"barn: its 50 tokens take .* are pinned"):
        engine.remember(ids_of(50, seed=30), "barn")
    engine.remember(pinned, "again")  # known already: nothing to run, nothing to add
    assert len(list(engine._reuse.snapshots)) == 1


def test_remembering_needs_a_cache_and_room(tiny: TinyBundle, plain: Engine):
    with pytest.raises(RequestError, match="no prefix cache"):
        plain.remember(ids_of(9), "x")
    engine = open_engine(tiny)
    with pytest.raises(RequestError) as error:
        engine.remember(ids_of(CONTEXT), "x")
    assert error.value.code == "context_length_exceeded"


def test_a_cancelled_prompt_leaves_what_was_run(tiny: TinyBundle, plain: Engine):
    engine = open_engine(tiny)
    prompt = ids_of(100)
    assert list(engine.generate(prompt, max_new_tokens=5, cancel=SetAfter(3))) == []
    assert answer(engine, prompt) == answer(plain, prompt)
    assert reused(engine) == 3 * CHUNK


def test_a_failed_step_leaves_nothing(tiny: TinyBundle, plain: Engine, monkeypatch: pytest.MonkeyPatch):
    engine = open_engine(tiny)
    prompt = ids_of(60)
    answer(engine, prompt)

    def fail(*args, **options) -> None:
        raise MemoryError("no")

    with monkeypatch.context() as broken:
        broken.setattr(engine._session, "prefill", fail)
        with pytest.raises(MemoryError):
            answer(engine, [*prompt, 40])
    # Nothing is known of the caches: fill them with what no attention survives.
    for value in engine._session.caches.values.values():
        value.numpy()[...] = np.nan
    assert answer(engine, [*prompt, 41]) == answer(plain, [*prompt, 41])
    assert reused(engine) == 0


def test_an_overtaken_generation_touches_nothing(tiny: TinyBundle, plain: Engine):
    engine = open_engine(tiny)
    prompt = ids_of(60)
    old = engine.generate(ids_of(50, seed=8), max_new_tokens=5)
    new = engine.generate(prompt, max_new_tokens=5)
    tokens = [next(new)]
    with pytest.raises(RuntimeError, match="another generation"):
        next(old)
    assert [*tokens, *new] == answer(plain, prompt, 5)


def test_drawn_answers_are_the_same(tiny: TinyBundle, plain: Engine):
    engine = open_engine(tiny)
    params = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=5)
    system = [*ids_of(60), MARK]
    for seed in range(3):
        prompt = system + ids_of(20, seed=seed)
        expected = list(plain.generate(prompt, params, max_new_tokens=15))
        assert list(engine.generate(prompt, params, max_new_tokens=15)) == expected
    assert reused(engine) == len(system)


def test_the_default_budget_is_a_part_of_what_the_device_has_left(tiny: TinyBundle):
    manifest = tiny.bundle.manifest
    left = manifest.runtime.memory_budget_mib * 2**20 - (
        manifest.memory.weights_bytes + manifest.memory.kv_bytes + manifest.memory.overhead_bytes
    )
    assert default_budget_bytes(manifest) == min(left // 4, 128 * 2**20)


# Prompts with sounds.


@pytest.fixture(scope="module")
def hearing(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=256, chunk=CHUNK, model=dict(audio=TINY))


def sound(seed: int, tokens: int = 13) -> Soft:
    return Soft(np.random.default_rng(seed).standard_normal((tokens, 64)).astype(np.float32))


def heard(engine: Engine, parts: list[Part]) -> list[int]:
    return list(engine.generate_from(iter(parts), max_new_tokens=12))


def pieces_of(parts: list[Part]) -> list[Part]:
    """As they arrive while somebody speaks."""
    arriving: list[Part] = []
    for part in parts:
        if isinstance(part, Soft):
            arriving += [NOW, *(Soft(part.rows[at : at + 3]) for at in range(0, len(part.rows), 3)), NOW]
        else:
            arriving.append(part)
    return arriving


@pytest.mark.parametrize("live", [False, True])
def test_sounds_are_told_apart_by_what_was_heard(hearing: TinyBundle, live: bool):
    plain, engine = endless(Engine(hearing.bundle)), open_engine(hearing)
    system = [*ids_of(40), MARK]
    arrive = pieces_of if live else list
    first: list[Part] = [[*system, 30], sound(1), [31, 32]]
    told = heard(engine, arrive(first))
    assert told == heard(plain, first)
    assert reused(engine) == 0
    other: list[Part] = [[*system, 30], sound(2), [31, 32]]
    assert heard(engine, arrive(other)) == heard(plain, other)
    assert reused(engine) == len(system)
    # The first conversation goes on; its sound is in the prompt again.
    longer: list[Part] = [[*system, 30], sound(1), [31, 32, *told, *ids_of(9, seed=5)], sound(3), [33]]
    assert heard(engine, arrive(longer)) == heard(plain, longer)
    # Spoken live, what has come before the sound is run at once: from the system turn.
    assert reused(engine) == (len(system) if live else len(system) + 1 + 13 + 2 + len(told) - 1)
