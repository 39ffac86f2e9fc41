"""Replicas of `erllama serve` behind vllm-router and beside Dynamo's selection service: `make test-routers`."""
