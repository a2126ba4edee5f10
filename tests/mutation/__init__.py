"""Faults put into the product one at a time, and whether the fast tests notice: `make mutants`."""
