"""Report of a sweep: tables, Pareto fronts of size and loss, heat maps of recipes and models, and CSV."""
