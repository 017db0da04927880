"""What is measured: each module prints a table and writes JSON. `demo` is the whole way, timed, on this machine."""
