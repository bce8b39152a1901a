"""Judging a text-to-image model as Imagen 3's report does (arXiv 2408.07009): alignment, quality, the fairness of what is
drawn, and what can be extracted."""
