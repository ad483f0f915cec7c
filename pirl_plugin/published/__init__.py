"""Published numbers, each with its source, and which of them were measured under which of our protocols.

Reads a table that lies beside it; needs nothing but Python, and never torch.
"""

from pirl_plugin.published.results import BENCHMARKS, Published, available, matching, related, results, rows
from pirl_plugin.published.tables import beside, listed

__all__ = ["BENCHMARKS", "Published", "available", "beside", "listed", "matching", "related", "results", "rows"]
