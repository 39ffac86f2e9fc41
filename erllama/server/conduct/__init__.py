"""What every API of the server has in common: endpoints, bodies, errors, keys, limits, and logs.

No module here knows an API. The APIs import this package, and it imports nothing of them.
"""
