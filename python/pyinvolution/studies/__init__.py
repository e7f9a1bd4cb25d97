"""Studies of networks and operators: comparisons in time and memory, figures, a demonstration, architecture search.

They train by the recipes and need the same extra, ``train``; the search also needs ``search``.
"""
