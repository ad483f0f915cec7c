"""What ``tools/bench.py`` measures: one file an area, each with the plain way that it is measured against."""
