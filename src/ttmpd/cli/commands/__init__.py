"""One file per command: ``command`` runs it, ``PLACE`` orders ``ttmpd --help``, what it prints is beside it.

``_name`` files hold what commands share.
"""
