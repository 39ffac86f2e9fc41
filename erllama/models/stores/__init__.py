"""Models that lie on this machine, in the stores of several programs. Only reads them.

Each module knows the layout of one store. `walk` reads directories within limits. None imports another store.
"""
