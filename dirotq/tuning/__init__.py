"""Measuring plans on the GPU that is here: for ``dirotq tune``, and for the tables we ship."""
