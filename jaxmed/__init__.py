"""Exact causal mediation analysis of language models."""
