"""What of each kernel aot.py compiles for chips that are not here; every module has ``builds``."""
