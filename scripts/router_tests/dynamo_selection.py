"""Asks Dynamo's selection service which replica has prompts. Runs in the environment that has ai-dynamo-runtime.

Reads one request in JSON from each line of stdin, and writes one answer for each. A request has a worker to
register, or the token ids of a prompt.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from dynamo._core import SelectionService

_MODEL = "demo"


async def _answer(service: SelectionService, request: dict[str, Any]) -> object:
    if "worker" in request:
        worker = request["worker"]
        if request["again"]:
            await service.delete_worker(worker["worker_id"])
        worker["kv_events_endpoints"] = {0: worker.pop("events")}
        record = await service.upsert_worker({**worker, "model_name": _MODEL, "max_num_batched_tokens": 8192})
        return record["lifecycle"]
    scores = await service.overlap_scores({"model_name": _MODEL, "token_ids": request["token_ids"]})
    selected = await service.select({"model_name": _MODEL, "token_ids": request["token_ids"]})
    return {"selected": selected["worker_id"], "workers": scores["workers"], "n_blocks": scores["num_blocks"]}


async def _main() -> None:
    service = SelectionService(indexer_threads=1)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await _answer(service, json.loads(line))), flush=True)
    service.shutdown()


if __name__ == "__main__":
    asyncio.run(_main())
