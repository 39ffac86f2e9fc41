"""Runs replies for the APIs: options, streams, disconnected clients, and counts for the access log.

An API translates its body into messages and options, calls this package, and translates the events back.
"""
