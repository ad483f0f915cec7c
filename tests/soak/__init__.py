"""Faults of every kind, in numbers: each module is a program, ``python tests/soak/NAME.py --help``.

Small versions of all of them run as ordinary tests, from ``tests/test_soak.py``.
"""
