"""What a user calls data, read into one compact form."""
