"""Search strategies, one file each, and their registry."""

from mqadapt_rs.search.strategies.registry import STRATEGIES, Strategy

__all__ = ["STRATEGIES", "Strategy"]
