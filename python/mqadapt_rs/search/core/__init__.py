"""The nouns of a search: space of plans, evaluation, journal, study, statistics, executors."""
