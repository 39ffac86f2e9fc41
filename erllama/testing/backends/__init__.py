"""Rules for backends, and the reference model that a backend is compared with.

`conformance` holds `BackendConformance`, the public class. It collects the rules of `memory_rules`, `long_rules`
and `embedder_rules` and adds those about vocabularies and decoding. `machine` holds `BackendMachine`, which needs
Hypothesis. `rules` is their common base, and `model` records what a backend must compute.
"""
