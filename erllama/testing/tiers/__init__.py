"""Rules for cache tiers, and the reference model that a tier is compared with.

`conformance` holds `TierConformance`, the public class. It collects the rules of `lifecycle_rules` and adds those
about reading and writing. `rules` is their common base, and `model` records what a tier must hold. Imports the
cache; does not import the engine.
"""
