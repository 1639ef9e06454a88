"""From measured ranges to a quantized graph: formats, statistics, recipes and plans.

histogram   counts of magnitudes in bins that do not depend on the data, so that counts of several runs add up
ranges      the file of statistics, which calibration writes and a build reads
estimators  one clipping value from a tensor's counts
channels    the INT8 error of a tensor, predicted from its channels' counts
formats     scales, rounding, and weights in 8 bits
layers      the layers of a stage that can be quantized
recipes     named rules over module names
plan        recipe + ranges + weights -> how each layer is quantized (graph/passes/qdq.py writes it into the graph)
apply       what a build does with these: check recipe and ranges first, then plan
verify      checks a written graph against its plan
simulate    the same rounding in PyTorch: the search tries it, and graphs are compared with it
coverage    the share of the work that is in 8 bits
record      recipe, plan and coverage, written beside the graph
measure     fidelity and speed compared with the unquantized denoiser
"""
