"""The command ``esrfs``: one module for each group of commands, all thin; what they do lies in the layers below.

Exit codes are an interface (``esrfs/exit_codes.py``). Results go to standard output, everything else to standard error.
"""
