"""Shipped recipes. The first line of each says what it is."""
