"""Any model of transformers: its layers made to route, sampled with a cache, saved and loaded.

Importing this package imports transformers; `import adaptive` does not.
"""

from adaptive.hub.adaptation import adapt

__all__ = ["adapt"]
