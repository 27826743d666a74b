"""What the allocator for several layer types does, case by case, and a uniform model against a plain pager."""

import random
from collections import Counter

import pytest

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.layer_policy import joint_longest_hit
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.retention import ANSWER, END, PROMPT, TRUNK, WAY, Wants, level, window_level
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.request import SamplingParams
from tests.core.test_two_level import T, brute_hit, make, snapshot
from tests.support.core import make_engine

PLENTY = 200


def run(a: TwoLevelAllocator, seq: str, tokens: list[int], salt: str = "", part: int = 24) -> int:
    """Compute a prompt in steps of `part`; returns the tokens that were cached."""
    hit = a.begin(seq, tokens, part, salt=salt)
    at = min(len(tokens), hit + part)
    a.advance(seq, at)
    while at < len(tokens):
        at = min(len(tokens), at + part)
        a.extend(seq, at)
        a.advance(seq, at)
    return hit


def decode(a: TwoLevelAllocator, seq: str, tokens: list[int], count: int) -> None:
    for _ in range(count):
        tokens.append(7)
        a.extend(seq, len(tokens))
        a.advance(seq, len(tokens))


def live(a: TwoLevelAllocator, seq: str) -> dict[str, list[int]]:
    """Table indices that are held, by type of the first table of each."""
    state = a._seqs[seq]
    return {
        a.plan.pools[t.kind].type.name: [i for i, p in enumerate(state.tables[t.group]) if p != NONE]
        for t in reversed(a.tables)
    }


def test_pages_leave_a_window_as_tokens_advance() -> None:
    a = make("full+window", PLENTY)  # a window of 9: a token reads 8 before it
    tokens = list(range(30))
    run(a, "x", tokens)
    decode(a, "x", tokens, 3)
    held = live(a, "x")
    assert held["full"] == list(range(9)), "full attention keeps all"
    assert held["sliding_window"] == [6, 7, 8], "tokens 24 and on, of 33"


def test_chunked_layers_start_anew_at_a_chunk() -> None:
    a = make("full+chunked", PLENTY)  # chunks of 8
    tokens = list(range(15))
    run(a, "x", tokens)
    assert live(a, "x")["chunked"] == [0, 1, 2, 3], "not before the next growth: the step still reads them"
    decode(a, "x", tokens, 2)
    assert live(a, "x")["chunked"] == [4], "token 16 begins a chunk"


@pytest.mark.parametrize(("kind", "page"), [("chunked", 3), ("sliding_window", 1)])
def test_drafts_of_a_step_leave_what_its_own_token_reads(kind: str, page: int) -> None:
    """`advance` was told of a token whose step is not submitted before its drafts have pages."""
    a = make("full+chunked" if kind == "chunked" else "full+window", PLENTY)
    tokens = list(range(15))
    run(a, "x", tokens)
    decode(a, "x", tokens, 1)  # token 15, the last of its chunk; it reads token 7
    assert a.can_extend("x", 20, drafts=True)
    a.extend("x", 20, drafts=True)
    assert page in live(a, "x")[kind]
    a.truncate("x", 16)
    tokens.append(7)
    a.extend("x", 17)
    assert page not in live(a, "x")[kind]
    a.check()


def test_one_page_of_state_however_long() -> None:
    a = make("full+state", PLENTY, checkpoint_every=1 << 20, renew_every=1 << 20)
    tokens = list(range(3))
    run(a, "x", tokens)
    decode(a, "x", tokens, 100)
    states = [t for t in a.tables if t.is_state]
    assert all(len(set(a._seqs["x"].tables[t.group]) - {NONE}) == 1 for t in states)


def test_a_window_hit_has_holes_outside_the_window() -> None:
    a = make("full+window", PLENTY)
    tokens = list(range(40))
    run(a, "x", tokens)
    a.end("x")
    assert run(a, "y", tokens) == 36
    assert live(a, "y")["sliding_window"][0] == 7, "token 36 reads from 28 on"
    assert all(table[0] == 0 for t, table in zip(a.tables, a.table("y"), strict=True) if t.spec.window)


def test_a_head_shorter_than_the_window_is_a_hit() -> None:
    a = make("full+window", PLENTY)
    run(a, "x", list(range(20)))
    assert run(a, "y", [*range(8), *range(90, 100)]) == 8


def test_a_branch_that_lost_its_window_falls_back() -> None:
    a = make("full+window", PLENTY)
    run(a, "x", list(range(40)))
    a.end("x")
    window = next(t for t in a.tables if t.spec.window)
    key = a._seqs.get("x")
    assert key is None
    # Evict the window page of tokens 16 to 19.
    probe = make("full+window", PLENTY)
    run(probe, "x", list(range(40)))
    page = a.cache.index.find(probe._seqs["x"].hashes[4], window.columns[0])
    a.cache.forget_name(page)
    a.arena.forget(page)
    a.check()
    want = [*range(24), 1, 1, 1, 1]
    assert run(a, "y", want) == brute_hit(probe, want) - 8 == 16, "24 and 20 would read it, 16 does not"


JOINT = {  # what is cached, and the longest prefix that all types of the model can use, of 10 blocks
    "full+window": ([0b1111111111, 0b1111100000], 10),
    "full+window, a hole in the window": ([0b1111111111, 0b1011111111], 8),
    "full+state": ([0b1111111111, 0b0001001000], 7),
    "window+state": ([0b1111111000, 0b0010001000], 8),
    "window+state, no window": ([0b0000000111, 0b0010001000], 0),
    "two windows": ([0b1111110000, 0b1110111111], 6),
    "three": ([0b0111111111, 0b1111111100, 0b0010000001], 8),
}


@pytest.mark.parametrize("case", JOINT)
def test_joint_hits(case: str) -> None:
    name = case.partition(",")[0]
    specs = [pool.type.spec for pool in make(name, PLENTY).plan.pools]
    present, longest = JOINT[case]
    assert joint_longest_hit(specs, present, 10, T) == longest


def test_the_second_request_hits_a_state_at_its_prompt_s_end() -> None:
    a = make("full+state", PLENTY, checkpoint_every=1 << 20)
    tokens = list(range(31))
    assert run(a, "x", tokens, part=40) == 0
    assert run(a, "y", tokens, part=40) == 0, "in the same step a state cannot be read"
    a.extend("x", 32)
    assert run(a, "z", tokens) == 28


def test_hints_keep_states_where_prompts_part() -> None:
    a = make("full+state", PLENTY, checkpoint_every=1 << 20, renew_every=1 << 20)
    document = list(range(20))
    a.begin("x", [*document, *range(50, 70)], 40, hints=[20])
    a.advance("x", 40)
    a.end("x")
    assert run(a, "y", [*document, *range(80, 100)]) == 20
    a.end("y")
    assert run(a, "z", [*document, *range(50, 70)]) == 36


def test_a_decoding_sequence_keeps_its_newest_state_only() -> None:
    a = make("state", PLENTY, checkpoint_every=1 << 20, renew_every=T)
    tokens = list(range(6))
    run(a, "x", tokens)
    decode(a, "x", tokens, 40)
    per_state = len(a.tables)
    assert len(a.cache.index) == 2 * per_state, "at the prompt's end and at the newest boundary"
    a.end("x")
    assert run(a, "y", tokens) == 44


def test_salts_do_not_share() -> None:
    a = make("three", PLENTY)
    tokens = list(range(30))
    run(a, "x", tokens, "tenant")
    a.end("x")
    assert run(a, "y", tokens) == 0 and run(a, "z", tokens, "tenant") == 28


def test_a_hit_is_not_counted_as_free_too() -> None:
    a = make("full", 8, mode="lcm")
    tokens = list(range(5 * T))
    run(a, "x", tokens)
    a.end("x")
    before, free = snapshot(a), a.available()
    assert free == 8
    with pytest.raises(OutOfPages) as error:  # 4 of 8 are hit: 5 more are not there
        a.begin("y", [*tokens[: 4 * T], *range(100, 100 + 5 * T)], 9 * T)
    assert (error.value.needed, error.value.have) == (5, 4)
    assert snapshot(a) == before, "a failed beginning leaves no trace"


def test_predicted_pages_are_those_taken() -> None:
    for name in ("full", "window", "full+window", "full+chunked", "full+state", "three"):
        a = make(name, PLENTY, prefix_caching=False)
        tokens = list(range(24))
        used = []
        a.begin("x", tokens, 24)
        a.advance("x", 24)
        for n in range(25, 120):
            a.extend("x", n)
            used.append(a.usage()[0])
            tokens.append(n)
            a.advance("x", n)
        assert max(used) <= a.pages_for(119), name
        if name in ("full", "full+state"):
            assert used[-1] == a.pages_for(119)


def test_what_was_hit_outlives_a_scan() -> None:
    a = make("full", 20, mode="lcm")
    often = list(range(4 * T + 1))
    for seq in ("a", "b"):
        run(a, seq, often)
        a.end(seq)
    for i in range(9):  # each seen once; together more than there is room for
        run(a, f"s{i}", [1000 + i] * (3 * T))
        a.end(f"s{i}")
        if i < 5:
            assert brute_hit(a, often) == 4 * T
    assert len(a.cache.index) <= 20


def test_the_deepest_page_goes_first() -> None:
    a = make("full", 8, mode="lcm")
    tokens = list(range(6 * T))
    run(a, "x", tokens)
    a.end("x")
    run(a, "y", [9] * (4 * T))
    assert brute_hit(a, [*tokens, 1]) == 4 * T


def test_reset_is_refused_while_in_use() -> None:
    a = make("full+window", PLENTY)
    run(a, "x", list(range(20)))
    assert not a.reset_cache()
    a.end("x")
    assert a.reset_cache() and brute_hit(a, list(range(20))) == 0
    assert a.ledger().free == a.ledger().arena


def test_a_bill_counts_what_one_sequence_holds() -> None:
    a = make("three", PLENTY)
    tokens = list(range(30))
    run(a, "x", tokens)
    bill, ledger = a.bill("x"), a.ledger()
    assert (bill["tokens"], bill["tail"]) == (ledger.tokens, ledger.tail) and bill["shared"] == 0
    a.fork("x", "y", list(tokens), 30)
    assert a.bill("y")["shared"] > 0


class Pager:
    """Pages of one kind, a prefix cache that forgets nothing: what a uniform model must do while memory lasts."""

    def __init__(self, pages: int) -> None:
        self.pages, self.refs, self.known = pages, Counter[tuple[int, ...]](), set[tuple[int, ...]]()
        self.tables: dict[str, list[tuple[int, ...]]] = {}
        self.tails: dict[str, int] = {}

    def used(self) -> int:
        return len(+self.refs) + sum(self.tails.values())

    def begin(self, seq: str, tokens: list[int]) -> int:
        keys = [tuple(tokens[: i + T]) for i in range(0, len(tokens) // T * T, T)]
        hit = 0
        while hit < (len(tokens) - 1) // T and keys[hit] in self.known:
            hit += 1
        self.tables[seq] = keys[:hit]
        self.refs.update(keys[:hit])
        self.tails[seq] = -(-len(tokens) // T) - hit
        self.fill(seq, tokens)
        return hit * T

    def extend(self, seq: str, tokens: list[int]) -> None:
        self.tails[seq] = -(-len(tokens) // T) - len(self.tables[seq])
        self.fill(seq, tokens)

    def fill(self, seq: str, tokens: list[int]) -> None:
        """Full pages get a name, unless another has it: then they stay one's own."""
        for end in range(T, len(tokens) + 1, T):
            key = tuple(tokens[:end])
            if key not in self.known or (not self.refs[key] and key not in self.tables[seq]):
                self.known.add(key)
                self.tables[seq].append(key)
                self.refs[key] += 1
                self.tails[seq] -= 1

    def end(self, seq: str) -> None:
        self.refs.subtract(self.tables.pop(seq))
        del self.tails[seq]


@pytest.mark.parametrize("seed", range(6))
def test_a_uniform_model_does_what_a_pager_does(seed: int) -> None:
    rng = random.Random(seed)
    a, pager = make("full", 3000, mode="lcm"), Pager(3000)
    prompts: dict[str, list[int]] = {}
    for i in range(300):
        if prompts and rng.random() < 0.4:
            seq = rng.choice(sorted(prompts))
            a.end(seq)
            pager.end(seq)
            del prompts[seq]
        elif prompts and rng.random() < 0.5:
            seq = rng.choice(sorted(prompts))
            for _ in range(rng.randint(1, 9)):
                prompts[seq].append(rng.randint(0, 1))
                a.extend(seq, len(prompts[seq]))
                a.advance(seq, len(prompts[seq]))
                pager.extend(seq, prompts[seq])
        else:
            tokens = [rng.randint(0, 2) // 2 for _ in range(rng.randint(1, 30))]
            prompts[f"s{i}"] = tokens
            hit = a.begin(f"s{i}", tokens, len(tokens))
            a.advance(f"s{i}", len(tokens))
            assert hit == pager.begin(f"s{i}", tokens)
        assert a.usage()[0] == pager.used()
        assert a.available() == pager.pages - pager.used()
    a.check()


@pytest.mark.parametrize("known", [2, T])
@pytest.mark.parametrize("target", [T + 1, 3 * T])
def test_a_fork_of_a_sequence_that_came_back_with_room(known: int, target: int) -> None:
    """What is written next comes after the known tokens, however far the room reaches: that page is copied."""
    a = make("full+state", 20, host=10)
    tokens = list(range(known))
    a.begin("x", tokens, known)
    a.advance("x", known)
    assert a.swap_out("x")
    a.swap_in("x", 2 * T)
    a.fork("x", "y", list(tokens), known)
    grown = a.extend("x", target)
    assert grown is not None
    for t, mine, its in zip(a.tables, a.table("x"), a.table("y"), strict=True):
        first = known // t.tokens  # the entry that is written
        assert mine[first] not in its and mine[first] not in mine[:first]
        assert t.is_state or first * t.tokens == known or t.group in {copy.group for copy in grown.copies}
    a.check()


@pytest.mark.parametrize("hints", [(), (40,)])
def test_a_hint_reaches_the_states_through_the_scheduler(hints: tuple[int, ...]) -> None:
    """A prompt that parts long before the first one's end goes on from the message's end that was hinted at."""
    engine = make_engine(60, model_name="full+state", max_num_batched_tokens=64)
    document = list(range(40))
    params = SamplingParams(max_tokens=2, cache_hints=hints)
    cached = []
    for name, question in (("a", 7), ("b", 8)):
        engine.add(name, [*document, *[question] * 8], params)
        while engine.has_work:
            cached += [o.num_cached_tokens for o in engine.step() if o.finish_reason]
    assert cached == [0, 40 if hints else 32], "without a hint, the last checkpoint on the way"


def test_where_two_prompts_have_parted_the_third_goes_on() -> None:
    """A system prompt that nobody hinted at."""
    a = make("full+state", PLENTY, checkpoint_every=1 << 20, renew_every=1 << 20)
    hits = []
    for i in range(4):
        hits.append(run(a, f"s{i}", [*range(20), *[100 + i] * 60]))
        a.end(f"s{i}")
    assert hits == [0, 0, 0, 20]


def test_points_on_the_way_are_thinned_by_halves() -> None:
    assert [level(n, 16) for n in (16, 32, 48, 64, 8)] == [0, 1, 0, 2, -1]
    for reach in (1, 5, 9, 100):
        spacing = 1 << reach.bit_length()
        for end in range(4, 300, 4):
            points = [level(n, spacing) for n in range(end, end + reach) if n % spacing == 0]
            assert window_level(end, reach) == max(points, default=-1), (end, reach)


def test_what_is_hardly_wanted_goes_first() -> None:
    wants = Wants()
    wants.expect(PROMPT)
    assert wants.order[ANSWER] < wants.order[PROMPT] == wants.order[TRUNK], "at first, what prompts look like"
    for _ in range(4):
        wants.note(ANSWER, 4000)
    assert wants.order[PROMPT] < wants.order[ANSWER] == wants.order[TRUNK] == wants.order[END]
    for _ in range(100):
        wants.note(WAY, 4000)
    assert (
        max(wants.order[PROMPT], wants.order[ANSWER], wants.order[END])
        < wants.order[WAY]
        < wants.order[TRUNK]
    )
