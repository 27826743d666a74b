"""Prefill and decode on engines of their own, with the KV cache sent between them (DistServe, 2401.09670).

Both sides are the same scheduler: a prefill engine runs prompts up to their first token, a decode engine gets
them with their KV and goes on. What is between: the bytes of the prompt's KV over the network, device by device
in parallel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmtool.core.routing import make_router
from llmtool.hardware import Cluster
from llmtool.sim.collectives import NETWORK_HOP, NETWORK_SHARE
from llmtool.sim.deployment import Deployment
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.replica import Finished, Replica
from llmtool.sim.simulate import SimResult
from llmtool.sim.stepcost import PlanCost
from llmtool.sim.workload import Workload, sim_request


@dataclass(frozen=True, slots=True)
class Split:
    """prefill, decode: deployments of the same model; their dp counts engines."""

    prefill: Deployment
    decode: Deployment

    @property
    def devices(self) -> int:
        return self.prefill.plan.devices + self.decode.plan.devices


def transfer_seconds(split: Split, cluster: Cluster, tokens: int) -> float:
    """Sending the KV of `tokens` tokens. Every device of the side with fewer of them per engine sends its share,
    over the network where the two sides do not fit one node."""
    memory = device_memory(split.prefill, cluster.device)
    plan = split.prefill.plan
    stage_bytes = memory.group.bytes_per_token * tokens
    lanes = min(plan.tp, split.decode.plan.tp)
    whole = stage_bytes * plan.tp  # of one stage; stages send in parallel
    inside = split.devices <= cluster.per_node
    rate = cluster.device.link if inside else cluster.device.network
    return NETWORK_HOP + whole / (lanes * rate * NETWORK_SHARE)


def simulate_split(
    split: Split, cluster: Cluster, ops: Ops, workload: Workload, router: str | None = None
) -> SimResult:
    """Run an open-loop workload. The result's deployment is the decode side's; its devices are both sides'."""
    p_cost, d_cost = PlanCost(split.prefill, cluster, ops), PlanCost(split.decode, cluster, ops)
    p_memory, d_memory = (device_memory(d, cluster.device) for d in (split.prefill, split.decode))
    prefills = [
        Replica(p_cost, p_memory) for _ in range(split.prefill.plan.dp * split.prefill.plan.attention_dp)
    ]
    decodes = [
        Replica(d_cost, d_memory, prefilled=True)
        for _ in range(split.decode.plan.dp * split.decode.plan.attention_dp)
    ]
    router = router or split.prefill.engine.router
    choose = make_router(router)
    for index, row in enumerate(workload.rows):
        request = sim_request(index, row, row.arrival or 0.0)
        if choose.needs_load:
            for replica in prefills:
                replica.advance(request.at)
        prompt = request.prompt if workload.shares_prefixes else ()
        prefills[choose.pick([r.load for r in prefills], prompt)].add(replace(request, output=1))
    for replica in prefills:
        replica.advance(math.inf)
    first = {f.id: f for replica in prefills for f in replica.finished}
    rows = {f"{i:07d}": row for i, row in enumerate(workload.rows)}
    choose = make_router(router)
    arrivals = sorted(
        (f.finished + transfer_seconds(split, cluster, f.prompt_tokens), f.id)
        for f in first.values()
        if rows[f.id].output_len > 1
    )
    for at, name in arrivals:
        request = sim_request(int(name), rows[name], at)
        if choose.needs_load:
            for replica in decodes:
                replica.advance(at)
        # The prompt and its first token are there: a decode engine makes the rest.
        handed = replace(request, prompt=[*request.prompt, 1], output=request.output - 1)
        decodes[choose.pick([r.load for r in decodes])].add(handed)
    for replica in decodes:
        replica.advance(math.inf)
    rest = {f.id: f for replica in decodes for f in replica.finished}
    finished = [
        _joined(f, rest.get(f.id), rows[f.id].output_len) for f in sorted(first.values(), key=lambda f: f.id)
    ]
    begin = min(f.arrival for f in finished)
    return SimResult(
        deployment=split.decode,
        cost=d_cost,
        memory=d_memory,
        finished=finished,
        duration=max(f.finished for f in finished) - begin,
        totals=[r.totals for r in decodes],
        devices=split.devices,
        preemptions=sum(r.stats.preemptions for r in [*prefills, *decodes]),
        kv_peak=max(r.stats.pages_peak for r in decodes) / d_memory.pages,
    )


def _joined(first: Finished, rest: Finished | None, output: int) -> Finished:
    last = rest.finished if rest is not None else first.finished
    return Finished(
        first.id,
        first.arrival,
        first.first_scheduled,
        first.first_token,
        last,
        first.prompt_tokens,
        output,
        first.cached_tokens,
    )
