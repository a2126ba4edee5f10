"""Tiers: places outside the engine where chunks are kept. They know slots and bytes, nothing of
requests.
"""
