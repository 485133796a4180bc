"""Search for the layers that can have fewer K/V heads: strategies, evaluators, journal."""

from mqadapt_rs.search.api import search
from mqadapt_rs.search.core.evaluation import Evaluation, Evaluator, EvaluatorSpec, Metric
from mqadapt_rs.search.core.journal import JournalError
from mqadapt_rs.search.core.options import Options
from mqadapt_rs.search.core.space import Layers, Space
from mqadapt_rs.search.core.study import Study
from mqadapt_rs.search.runner import SearchResult, conduct
from mqadapt_rs.search.strategies.registry import STRATEGIES, Strategy

__all__ = [
    "STRATEGIES",
    "Evaluation",
    "Evaluator",
    "EvaluatorSpec",
    "JournalError",
    "Layers",
    "Metric",
    "Options",
    "SearchResult",
    "Space",
    "Strategy",
    "Study",
    "conduct",
    "search",
]
