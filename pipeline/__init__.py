"""The core every stage runs on: recipes, artifacts, the graph, the command line. Knows no torch."""
