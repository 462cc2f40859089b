"""Structured output: from what an answer must be to the tokens that may come next, through llguidance."""
