"""Inference: variational EM, conditional distributions, marginal likelihood, NUTS."""
