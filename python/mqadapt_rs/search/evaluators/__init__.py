"""Evaluators of plans: windows of text, lm-eval tasks, statistics, and the latency of a decoded token."""
