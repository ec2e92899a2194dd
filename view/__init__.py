"""What people see: generated texts, samples, --help. Only functions of the core import it."""
