"""KV events: a stream that reports which blocks a model can reuse, for routers in front of several replicas.

The format is vLLM's, so vllm-router, Dynamo and other subscribers of vLLM read it. `options` has the public
`KvEvents`, `wire` the messages, `published` the blocks that subscribers know, `replays` what late subscribers ask
for, `publisher` the thread and its sockets, and `publishing` starts it for a model. Imports run from `publishing`
to `publisher`, `replays`, `published` and `wire`. The package imports the engine and the cache. Needs
`pip install 'erllama[events]'`.
"""

from erllama.events.options import KvEvents

__all__ = ["KvEvents"]
