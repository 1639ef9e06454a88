"""From measured ranges to a quantized graph: formats, statistics, recipes, plans. Only simulate runs a network.

histogram   counts of magnitudes in bins that depend on no data, so that they add up
ranges      the file of statistics: what calibration writes and a build reads
estimators  one clipping value from many counts
formats     scales, rounding, weights in 8 bits
recipes     named rules over module names
plan        recipe + ranges + weights -> what each layer gets (graph/passes/qdq.py writes it into the graph)
simulate    the same rounding in PyTorch: what a search tries out, and what a graph is held against
record      recipe, plan and coverage, beside the graph
coverage    what share of the work that is
"""
