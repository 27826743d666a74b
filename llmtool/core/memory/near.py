"""The search behind the plan `near`: one bounded large page that suits all layer types.

For every large page P that some type's small pages nearly fill, each type takes the split of its layers into
tables and the tokens per page that waste least; given P the types are independent. The waste of a P
is the worst over lengths, relative to what is aimed at there (2.5 % at 1k tokens, 2 % from 8k).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmtool.core.memory.geometry import UNIT
from llmtool.core.memory.model import LayerType, ModelGeometry
from llmtool.core.memory.page_plan import MAX_GROUPS, MAX_STATE_GROUPS, PagePlan, Pool, _groups, _size
from llmtool.errors import InfeasibleError

# Aligned lengths flatter: a plan must hold between them too, so the rest are odd.
LENGTHS = tuple(
    (length, 0.025 if length < 8192 else 0.02)
    for length in (
        *(
            1024,
            1043,
            1117,
            1201,
            1303,
            1451,
            1601,
            1777,
            2003,
            2311,
            2777,
            3301,
            4001,
            5003,
            6007,
            7001,
            8009,
        ),
        *(8192, 8209, 9001, 11003, 16411, 24001, 32768, 32771, 65543, 131072, 131087),
    )
)
SHARES = (1, 2, 4)  # where whole pages miss the aim, one may have a half or a quarter of the tokens asked for
STATE_TABLE_COST = 0.002  # these tables have one entry, which no step appends to
TABLE_COST = 0.02  # of the waste aimed at: what one more block table must gain to be worth its CPU time

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _choices(kind: LayerType, tokens: int, finest: int) -> list[tuple[int, int]]:
    """(tables, tokens per page): splits of the layers that differ in the layers of a page."""
    count = len(kind.layers)
    parts = sorted({-(-count // most) for most in range(1, count + 1)})
    sizes = [tokens]
    if not kind.is_state:
        sizes = [tokens // share for share in SHARES if share <= finest and tokens % share == 0]
    most = MAX_STATE_GROUPS if kind.is_state else MAX_GROUPS
    return [(p, size) for p in parts if p <= most for size in sizes]


def _least_page(kind: LayerType, parts: int, tokens: int) -> int:
    most = -(-len(kind.layers) // parts)
    return -(-most * kind.spec.bytes_for(tokens) // UNIT) * UNIT


def near_plan(geometry: ModelGeometry, tokens_per_page: int, max_page: int) -> PagePlan:
    """The plan of least waste with a large page of at most `max_page` bytes. Raises InfeasibleError when a layer's
    page alone is larger."""
    best, least = None, np.inf
    for finest in SHARES:
        plan, score, missed = _search(geometry, tokens_per_page, max_page, finest)
        if score < least:
            best, least = plan, score
        if not missed:
            break
    assert best is not None
    return best


def _search(
    geometry: ModelGeometry, tokens_per_page: int, max_page: int, finest: int
) -> tuple[PagePlan, float, bool]:
    """The best plan with pages of at least 1/finest of the tokens, its score, and whether it misses an aim."""
    types = geometry.types()
    choices = [_choices(kind, tokens_per_page, finest) for kind in types]
    pages = [[_least_page(k, *c) for c in cs] for k, cs in zip(types, choices, strict=True)]
    for kind, sizes in zip(types, pages, strict=True):
        if min(sizes) > max_page:
            raise InfeasibleError(
                f"The smallest page of the {kind.name} layers of {geometry.name} has {_size(min(sizes))}, "
                f"and large pages are bounded at {_size(max_page)}.",
                "Raise the bound, or take fewer tokens per page.",
            )
    strides = {s for row in pages for s in row if s <= max_page}
    large = np.array(
        sorted({k * s for s in strides for k in range(1, max(1, min(max_page // s, 4 * MAX_GROUPS)) + 1)}),
        dtype=np.int64,
    )
    large = large[large >= max(min(row) for row in pages)]
    image = 6404  # four tiles of 1601 image tokens, where a model reads images
    useful = np.array([geometry.live_bytes(n, image) for n, _ in LENGTHS], dtype=np.float64)
    aims = np.array([aim for _, aim in LENGTHS])
    weight = 1 / useful / aims  # allocated bytes -> waste in units of the aim
    total = np.zeros((len(LENGTHS), len(large)))
    cost = np.zeros(len(large))
    best: list[Ints] = []
    for kind, options, least in zip(types, choices, pages, strict=True):
        # option x length x P: large pages of this type, in bytes
        taken = np.array(
            [
                _allocated(kind, parts, tokens, small, large, image)
                for (parts, tokens), small in zip(options, least, strict=True)
            ]
        )
        many = np.array([parts for parts, _ in options], dtype=np.float64)[:, None]
        finer = np.array([tokens_per_page / tokens - 1 for _, tokens in options])[:, None]
        price = (STATE_TABLE_COST if kind.is_state else TABLE_COST) * (many + finer)
        score = (taken * weight[None, :, None]).max(axis=1) + price
        pick = score.argmin(axis=0)
        best.append(pick)
        columns = np.arange(len(large))
        total += taken[pick, :, columns].T
        cost += price[pick, 0]
    waste = (1 - useful[:, None] / total) / aims[:, None]
    tables_of, states_of = np.zeros(len(large), dtype=np.int64), np.zeros(len(large), dtype=np.int64)
    for kind, options, pick in zip(types, choices, best, strict=True):
        tables = np.array([parts for parts, _ in options], dtype=np.int64)[pick]
        if kind.is_state:
            states_of += tables
        else:
            tables_of += tables
    few = (tables_of <= MAX_GROUPS) & (states_of <= MAX_STATE_GROUPS)
    score = np.where(few, waste.max(axis=0) + cost, np.inf)
    # A model of more types than tables are allowed gets the fewest that it can have.
    at = int(score.argmin()) if np.isfinite(score).any() else int(np.asarray(tables_of).argmin())
    page = int(large[at])
    pools = []
    for kind, options, least, pick in zip(types, choices, pages, best, strict=True):
        parts, tokens = options[pick[at]]
        per_large = page // least[pick[at]]
        stride = page // per_large // UNIT * UNIT
        pools.append(Pool(kind, _groups(kind, parts, tokens, stride), per_large))
    return PagePlan("near", geometry, page, tuple(pools)), float(score[at]), bool(waste[:, at].max() > 1)


def _allocated(kind: LayerType, parts: int, tokens: int, small: int, large: Ints, image: int) -> Floats:
    """Bytes of large pages by (length, P); infinite where the small page does not fit P."""
    per_large = large // small
    rows = [-(-parts * kind.pages(n, image, tokens) // np.maximum(per_large, 1)) * large for n, _ in LENGTHS]
    return np.where(per_large[None, :] > 0, np.array(rows, dtype=np.float64), np.inf)
