"""Watch a text being generated: terminal.py, page.py. Imported by sample.py and eval/ only."""
