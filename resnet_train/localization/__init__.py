"""Localization (appendix C): where the object of an image's class is."""
