"""Which layers can do with fewer K/V heads: strategies, evaluators, journal."""

from .api import search
from .conduct import SearchResult, conduct
from .evaluation import Evaluation, Evaluator, EvaluatorSpec, Metric
from .journal import JournalError
from .space import Heads, Space
from .strategies import STRATEGIES, Strategy
from .study import Options, Study

__all__ = [
    "STRATEGIES",
    "Evaluation",
    "Evaluator",
    "EvaluatorSpec",
    "Heads",
    "JournalError",
    "Metric",
    "Options",
    "SearchResult",
    "Space",
    "Strategy",
    "Study",
    "conduct",
    "search",
]
