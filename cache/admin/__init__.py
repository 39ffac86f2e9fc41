"""A cache directory for operators, without a `Cache` or a model.

`maintenance` lists, verifies and prunes; `archive` exports and imports. Imports tiers; does not
import the pipeline.
"""
