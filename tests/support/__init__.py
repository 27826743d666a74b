"""Shared test equipment."""
