"""Continuous batching: which pictures are stepped together, and the work of drawing them. It knows nothing of HTTP."""
