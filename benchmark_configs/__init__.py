"""Hydra configurations, installed with the package so that a wheel finds them."""
