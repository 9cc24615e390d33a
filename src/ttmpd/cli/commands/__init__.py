"""One file per command: its function ``command`` is what runs. ``_name`` files hold what they share."""
