"""Failure discovery: in which describable slices of its inputs a classifier fails more than elsewhere.

After Wiles, Albuquerque and Gowal 2022, "Discovering Bugs in Vision Models using Off-the-shelf Image Generation and
Captioning" (arXiv 2208.08831).
"""
