"""Basalt: train, evaluate and serve your own LLaVA-style vision assistant."""
