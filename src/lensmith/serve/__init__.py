"""Trying a model: `lensmith ask` and `lensmith serve`, an OpenAI-compatible endpoint with a page of its own."""
