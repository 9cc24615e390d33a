"""Read the user's data, images or text, into one compact form."""
