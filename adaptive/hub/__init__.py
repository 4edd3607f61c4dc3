"""Any model of transformers: its layers made to route, sampled with a cache, saved and loaded.

Importing this package imports transformers; `import adaptive` does not.
"""

from adaptive.hub.adaptation import adapt
from adaptive.hub.saving import load_adapted

__all__ = ["adapt", "load_adapted"]
