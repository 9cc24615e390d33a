"""One file per command.

``command`` runs it, ``PLACE`` orders ``ttmpd --help``, ``EXAMPLES`` end its own; what it prints is beside it.
``_name`` files hold what commands share.
"""
