"""`make bench`: what an operation costs through the whole stack, as JSON on stdout.

Figures of one run are comparable with each other; between machines and runs compare ratios.
"""
