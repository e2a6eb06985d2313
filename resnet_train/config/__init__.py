"""Configurations of the commands and their checks, which run before torch is imported."""
