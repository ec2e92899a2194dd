"""Watch a text being generated: terminal.py draws it, watch.py writes a page."""
