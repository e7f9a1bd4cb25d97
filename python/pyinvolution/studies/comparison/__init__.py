"""Comparisons of recipes from data to table: trainings over several seeds, all sides tuned by the same means."""
