"""Watch a text being generated: terminal.py, watch.py. Imported by sample.py and eval/ only."""
